"""Calibration: text to windows, blocks run one at a time, and what is decided or fitted by what flows through them."""
