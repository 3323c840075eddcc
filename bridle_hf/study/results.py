"""Results of a study: rows of results.jsonl, which samples were right as bits; scores by set, task and source."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridle_hf.common.files import write_json


@dataclass(frozen=True)
class Scores:
    """What one source of features got on one task: by seed, by read-out, as in results.jsonl.

    The input itself has no seed: its one row stands beside each. `cpu_seconds` is what pretraining took up to there,
    by seed, where that is known.
    """

    by_seed: Mapping[int, Mapping[str, Mapping[str, Any]]]
    items: str
    clusters: Sequence[str]
    seedless: bool
    cpu_seconds: Mapping[int, float] = field(default_factory=dict)

    def of(self, readout: str) -> list[float]:
        return [100 * found[readout]["score"] for found in self.by_seed.values() if readout in found]

    def correct(self, seeds: Sequence[int], readout: str) -> np.ndarray:
        """(seeds, samples) bool."""
        rows = [self.by_seed[min(self.by_seed) if self.seedless else seed] for seed in seeds]
        return np.stack([unbits(row[readout]["correct"], len(self.clusters)) for row in rows])


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


def gather(rows: Sequence[dict[str, Any]], out: Path) -> dict[str, dict[str, dict[str, Scores]]]:
    """Rows of results.jsonl by set, task and source, as `rq@1`, `untrained` or `patches`."""
    found: dict[tuple[str, str, str], dict[int, Any]] = {}
    seconds: dict[tuple[str, str, str], dict[int, float]] = {}
    about: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        for task, sources in row["scores"].items():
            for source, readouts in sources.items():
                key = row["set"], task, source.replace("iteration ", f"{row['arm']}@")
                # Runs of several arms may read the same features out in several ways.
                found.setdefault(key, {}).setdefault(row["seed"], {}).update(readouts)
                if (took := row.get("cpu_seconds", {}).get(source)) is not None:
                    seconds.setdefault(key, {})[row["seed"]] = took
                about[key] = row
    scores: dict[str, dict[str, dict[str, Scores]]] = {}
    for (set_name, task, source), by_seed in found.items():
        row = about[set_name, task, source]
        scores.setdefault(set_name, {}).setdefault(task, {})[source] = Scores(
            dict(sorted(by_seed.items())), row["items"]["hash"], read_items(out, row)[task],
            row["features"] == "input", seconds.get((set_name, task, source), {}),
        )  # fmt: skip
    return scores


def bits(correct: np.ndarray) -> str:
    """Which samples were right, (samples,) bool, as bits in hexadecimal, the first sample the highest bit."""
    return np.packbits(correct).tobytes().hex()


def unbits(text: str, count: int) -> np.ndarray:
    """What [`bits`] was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(bool)
