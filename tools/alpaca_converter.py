"""MindFormers' alpaca_converter.py under its old name and flags: Alpaca records in, conversations out.

The same as `llama31-data convert`.
"""

from __future__ import annotations

import sys

from llama31_data.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["convert", *sys.argv[1:]]))
