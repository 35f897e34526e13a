"""Reading GGUF files: header, weights, architecture and vocabulary."""

MAGIC = b"GGUF"  # a file begins with it
