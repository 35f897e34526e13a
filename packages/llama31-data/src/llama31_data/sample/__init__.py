"""Forty instruction records of our own writing, in Alpaca's schema and a dozen scripts, for tests and first tries."""

from __future__ import annotations

from pathlib import Path

SAMPLE_PATH = Path(__file__).with_name("instructions.json")
