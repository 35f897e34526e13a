"""One module a command of `llama31-data`: `add_parser` declares its flags and sets `run`."""
