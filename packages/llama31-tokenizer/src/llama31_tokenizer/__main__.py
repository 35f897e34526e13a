"""`python -m llama31_tokenizer`: the command line."""

from __future__ import annotations

from llama31_tokenizer.cli import main

raise SystemExit(main())
