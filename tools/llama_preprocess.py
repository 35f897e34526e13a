"""MindFormers' llama_preprocess.py under its old name, flags and defaults: conversations or text in, MindRecord out.

The same as `llama31-data preprocess`, where some of these flags have to be given.
"""

from __future__ import annotations

import argparse
import sys

from llama31_data.cli import main

# What the old script assumed. A flag on the command line comes later and so wins.
_DEFAULTS = (
    "--dataset_type=wiki",
    "--input_glob=./dataset/wikitext-2/wiki.train.tokens",
    "--output_file=./dataset/wiki8192/wiki8192",
    "--model_file=./ckpt/llama3/tokenizer.model",
    "--seq_length=8192",
)


def run() -> int:
    """Takes the one old flag that means nothing here, and hands on the rest."""
    old = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    old.add_argument("--tokenizer", choices=("llama3",))
    _, arguments = old.parse_known_args()
    return main(["preprocess", *_DEFAULTS, *arguments])


if __name__ == "__main__":
    sys.exit(run())
