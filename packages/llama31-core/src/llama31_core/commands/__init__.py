"""One module a command of `llama31-core`: `add_parser` declares its flags and sets `run`, which gives the exit code.

Text is handled here and nowhere else in this package: these modules use the tokenizer.
"""
