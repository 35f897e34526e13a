"""Sizes as the command line spells them: text in, bytes out."""

from __future__ import annotations

import argparse


def parse_size(text: str) -> int:
    """Bytes from `5GB`, `200MB`, `64KB` or a plain number."""
    number, factor = text.upper(), 1
    for suffix, value in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if number.endswith(suffix):
            number, factor = number.removesuffix(suffix), value
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"size {text!r} is not like 5GB, 200MB or 1000000")
    return size
