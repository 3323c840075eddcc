"""Results of a study: rows of results.jsonl, with which samples were right as bits."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bridle_hf.common.files import write_json


def read_results(out: Path) -> list[dict[str, Any]]:
    """Rows of results.jsonl, the last one of each run; a line that a crash cut short is left out."""
    rows = {}
    path = out / "results.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["hash"]] = row
    return list(rows.values())


def append_result(out: Path, row: dict[str, Any]) -> None:
    """One more row, on a line of its own whatever stands before it."""
    path = out / "results.jsonl"
    cut_short = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(row, ensure_ascii=False) + "\n")


def keep_items(out: Path, row: dict[str, Any]) -> None:
    """Move the clusters of a row, the same for all runs on a set, to `items/<hash>.json`."""
    path = out / "items" / f"{row['set']}-{row['items']['hash']}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, row["items"].pop("clusters"))


def read_items(out: Path, row: dict[str, Any]) -> dict[str, list[str]]:
    """By task, the cluster of each sample that is tested."""
    return json.loads((out / "items" / f"{row['set']}-{row['items']['hash']}.json").read_text(encoding="utf-8"))


def bits(correct: np.ndarray) -> str:
    """Which samples were right, (samples,) bool, as bits in hexadecimal, the first sample the highest bit."""
    return np.packbits(correct).tobytes().hex()


def unbits(text: str, count: int) -> np.ndarray:
    """What [`bits`] was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(bool)
