"""How fast does the demo's model read with its memory on, through a server of its own, against memory off?

Runs the demo as a user does, and takes its report. The share that retrieval takes is what the model stood still for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Report

QUICK_TOKENS = 8_192


def main() -> int:
    """Writes benchmarks/results/demo.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"read {QUICK_TOKENS} tokens only")
    options = parser.parse_args()
    tokens = ["--tokens", str(QUICK_TOKENS)] if options.quick else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "memstore", "demo", "--out", folder, *tokens]
        subprocess.run(command, check=True)
        found = json.loads((Path(folder) / "report.json").read_text())
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


if __name__ == "__main__":
    sys.exit(main())
