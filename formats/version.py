"""The version of the software, which files name as their generator."""

VERSION = "0.1.0"
