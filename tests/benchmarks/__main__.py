"""
Ours beside our peers, in one table and one JSON:

    python tests/benchmarks [--json runs/bench.json] [--only quantization]

A ratio over 1 says that ours is better; it is the median over rounds, in each of which all contenders took a turn.
Each benchmark is a process of its own, on one thread.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import Row, table


FOLDER = Path(__file__).parent
BENCHMARKS = (
    "quantization", "feature_extraction", "video_loader", "embedding", "listing", "models", "steps", "padding",
    "shortcuts", "recipes",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"), help="file to write the rows to")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    options = parser.parse_args()
    rows, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            found = Path(folder) / f"{name}.json"
            subprocess.run(
                [sys.executable, FOLDER / f"bench_{name}.py", "--json", found],
                check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            print(f"{name}: {minutes(began)}", file=sys.stderr, flush=True)
            rows += json.loads(found.read_text(encoding="utf-8"))
    print(table(Row(**row) for row in rows))
    print(f"\n{len(rows)} rows in {minutes(began)}; written to {options.json}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def minutes(began):
    """Since then; and what processes that have ended took of the CPU, which a busy machine does not lengthen."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    return f"{(time.monotonic() - began) / 60:.1f} minutes ({cpu / 60:.1f} of the CPU)"


if __name__ == "__main__":
    main()
