"""JUnit reports in, one line out: `N passed, N failed, N skipped`. Exit code 1 if there is no report or no test passed.

Pants prints one line a file and keeps pytest's own summaries to itself; this is the sum of all of them.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main(directory: Path) -> int:
    total = failed = skipped = 0
    for report in sorted(directory.rglob("*.xml")):
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            total += int(suite.get("tests", 0))
            failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped += int(suite.get("skipped", 0))
    passed = total - failed - skipped
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
