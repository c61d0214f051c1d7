"""Trained adapters: reading PEFT's directories, and editing those of a finished file."""
