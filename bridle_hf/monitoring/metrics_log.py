"""Metrics log: `metrics.jsonl`, one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from bridle_hf.common.files import write_text


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, appended at once; on resume, cut back to the step resumed from."""

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = path
        kept = [] if resume_step is None else [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    # Not `splitlines`: names of files may hold what that takes for the end of a line.
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return rows
