"""For every test: processes that a test starts can import what the test itself can, wherever they run.

Pants gives a test its source folders as relative entries of `sys.path`; in goes that list, out comes PYTHONPATH.
"""

import os
import sys
from pathlib import Path


def pytest_configure() -> None:
    here = Path(__file__).resolve().parent
    roots = [str(path) for path in (Path(entry).resolve() for entry in sys.path if entry) if path.is_relative_to(here)]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*roots, *filter(None, inherited)]))
