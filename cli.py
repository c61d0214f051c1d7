"""Run the command line from a checkout: python cli.py convert in/ out.salr."""

import sys

from salr.cli import main

if __name__ == "__main__":
    sys.exit(main())
