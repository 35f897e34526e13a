"""`python -m llama31_ckpt`."""

from llama31_ckpt.cli import main

raise SystemExit(main())
