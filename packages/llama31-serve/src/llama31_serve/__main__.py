from llama31_serve.cli import main

raise SystemExit(main())
