"""Carrying out a plan: devices and workers, modules packed one at a time, and what lets an interrupted run go on."""
