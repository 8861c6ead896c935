"""How fast does the demo's model read with its memory on, through a server of its own, against memory off?

Runs the demo as a user does, or takes a run that there was. The share of retrieval is what the model stood still for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import Report

QUICK_TOKENS = 8_192


def main() -> int:
    """Writes benchmarks/results/demo.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"read {QUICK_TOKENS} tokens only")
    parser.add_argument("--report", type=Path, help="folder of a run of the demo, to take instead of running it")
    options = parser.parse_args()
    found = _report(options.report) if options.report else _run(["--tokens", str(QUICK_TOKENS)] * options.quick)
    report, case = Report("demo"), f"{found['tokens']} tokens of the standard library"
    report.add(case, "throughput, memory on", found["tokens_per_s"], "tokens/s", better="higher")
    report.add(case, "throughput, memory off", found["tokens_per_s_none"], "tokens/s", better="higher")
    report.add(case, "on / off", found["tokens_per_s"] / found["tokens_per_s_none"], "ratio", better="higher")
    report.add(case, "share waiting for retrieval", found["retrieval_share"], "ratio")
    none = found["perplexity_none"]
    report.add(case, "perplexity, own memory / none", found["perplexity_memory"] / none, "ratio", goal=0.95)
    other = found["perplexity_other_document"] / none
    report.add(case, "perplexity, other memory / none", other, "ratio", goal=1.0, better="higher")
    report.write()
    return 0


def _run(arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "memstore", "demo", "--out", folder, *arguments]
        subprocess.run(command, check=True)
        return _report(Path(folder))


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())
