"""`python -m llama31_core`."""

from llama31_core.cli import main

raise SystemExit(main())
