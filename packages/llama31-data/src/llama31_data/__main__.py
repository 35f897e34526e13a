"""`python -m llama31_data` is the `llama31-data` command."""

from llama31_data.cli import main

raise SystemExit(main())
