"""The commands of llama31-serve, one module each: `add_arguments(parser)` and `run(arguments) -> exit code`."""
