"""Prints the rows of all results that miss their goal; exits with 1 where there is one."""

from __future__ import annotations

import json
import sys

from benchmarks.report import RESULTS, Row, show


def main() -> int:
    """Reads every result that is there."""
    num_goals, missed = 0, []
    for path in sorted(RESULTS.glob("*.json")):
        rows = [Row(**row) for row in json.loads(path.read_text())["rows"]]
        num_goals += sum(row.goal is not None for row in rows)
        missed += [f"{path.stem}: {show(row)}" for row in rows if row.is_missed]
    print("\n".join(missed))
    print(f"{len(missed)} of {num_goals} goals are missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
