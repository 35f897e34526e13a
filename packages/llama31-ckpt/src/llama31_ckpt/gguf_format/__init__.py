"""Reading GGUF files: header, weights, architecture and vocabulary."""
