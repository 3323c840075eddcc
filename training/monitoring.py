"""What a run tells while it goes: metrics.jsonl, a tracker, a progress bar, pictures and the report."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bridle_hf.quantization_bridle import codebook_usage


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
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Monitor:
    """Sums metrics on the device; at a `flush` averages, writes and shows them.

    Nothing is copied to the host in between, so that a step need not wait for the device. A row should not reach over
    the end of a phase, or over a checkpoint: the sums are not saved.

    Args:
        seconds: What the run took before it was resumed.
    """

    def __init__(
        self,
        log: MetricsLog | None,
        accelerator: Any,
        total_steps: int,
        first_step: int,
        global_batch_size: int,
        seconds: float = 0.0,
    ):
        self.log, self.accelerator, self.global_batch_size = log, accelerator, global_batch_size
        # In a log file a bar is one line after another.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=total_steps, initial=first_step, disable=log is None, unit="step", dynamic_ncols=True,
            mininterval=interval, maxinterval=interval,
        )  # fmt: skip
        self.started = time.monotonic() - seconds
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.numbers: dict[str, int] = {}
        self.steps, self.waited, self.since = 0, 0.0, time.monotonic()

    def update(self, metrics: dict[str, torch.Tensor], waited: float) -> None:
        """Take in one step, which waited so many seconds for its data."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.numbers[name] = self.numbers.get(name, 0) + 1
        self.steps += 1
        self.waited += waited
        self.bar.update()

    def flush(self, step: int, position: dict[str, Any], rates: dict[str, float], skipped_steps: int) -> None:
        """Write what has come together since the last time; ranks are averaged, counts of codes summed.

        Args:
            step: Steps done.
            position: `phase`, `kind` and `iteration`.
            rates: Learning rate by side.
        """
        if self.steps == 0:
            return
        seconds = time.monotonic() - self.since
        means = self._means()
        sides = {name.split("/")[0] for name in means}
        row = {"step": step, **position, "time": round(time.monotonic() - self.started, 2)}
        row |= {"samples": step * self.global_batch_size}
        row |= {"samples_per_second": round(self.steps * self.global_batch_size / seconds, 2)}
        row |= {"data_wait_share": round(self.waited / seconds, 4), "skipped_steps": skipped_steps}
        row |= means | {f"{side}/lr": rate for side, rate in rates.items() if side in sides}
        if self.log is not None:
            self.log.write(row)
            self.bar.set_description(f"{position['kind']} {position['iteration']}", refresh=False)
            shown = {"loss": _loss_of(row), "samples/s": row["samples_per_second"]}
            shown = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
            self.bar.set_postfix(shown, refresh=False)
        if self.accelerator.trackers:
            self.accelerator.log(_flat(row), step=step)
        self._reset()

    def _means(self) -> dict[str, Any]:
        means: dict[str, Any] = {}
        for name in sorted(self.sums):
            value, number = self.sums[name].float(), self.numbers[name]
            if name == "counts":
                usage = codebook_usage(self.accelerator.reduce(value, "sum"))
                for entry in ("used_fraction", "perplexity", "normalized_entropy"):
                    means[f"usage/{entry}"] = _rounded(usage[entry])
            elif name == "usage/reseeded":
                # The same on every rank; how many in this stretch.
                means[name] = value.round().int().tolist()
            else:
                means[name] = _rounded(self.accelerator.reduce(value / number, "mean"))
        return means

    def event(self, row: dict[str, Any]) -> None:
        """Write a row that is not about steps: a phase that ended, a probe."""
        if self.log is not None:
            self.log.write({**row, "time": round(time.monotonic() - self.started, 2)})

    def close(self) -> None:
        self.bar.close()


def git_revision() -> str | None:
    """Revision of this source tree, if it is a git checkout."""
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader, or a run that is killed meanwhile, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _rounded(value: torch.Tensor) -> Any:
    def shorten(number: Any) -> Any:
        return [shorten(entry) for entry in number] if isinstance(number, list) else float(f"{number:.6g}")

    return shorten(value.tolist())


def _loss_of(row: dict[str, Any]) -> float | None:
    return row.get("encoder/loss", row.get("tokenizer/loss"))


def _flat(row: dict[str, Any]) -> dict[str, float]:
    """Numbers of a row, one entry per codebook."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}/{level + 1}": entry for level, entry in enumerate(value)}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat
