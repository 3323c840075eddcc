"""Metrics logging while a run goes: sums on the device, rows of metrics.jsonl, a tracker, a progress bar."""

import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm.auto import tqdm

from bridle_hf.monitoring.metrics_log import MetricsLog
from bridle_hf.quantization_bridle import codebook_usage


if TYPE_CHECKING:  # flops needs the schedule, whose steps measure gradients with what stands here
    from bridle_hf.monitoring.flops import ScheduleFlops


# tqdm's own guess of the time left takes all steps for equally long; ours stands in the postfix.
BAR_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Monitor:
    """Sums metrics on the device; at a `flush` averages, writes and shows them.

    Nothing is copied to the host in between, so that a step need not wait for the device. A row should not reach over
    the end of a phase, or over a checkpoint: the sums are not saved. Its speeds are those of its steps alone: what the
    run does between two stretches (saves, probes, reports) is not in them, but in the time that is left.

    Args:
        flops: FLOPs per sample over the schedule; its total is that of the progress bar.
        peak_tflops: what one process could do at most, for the MFU.
        seconds: what the run took before it was resumed.
    """

    def __init__(
        self,
        log: MetricsLog | None,
        accelerator: Any,
        flops: "ScheduleFlops",
        peak_tflops: float,
        first_step: int,
        global_batch_size: int,
        seconds: float = 0.0,
    ):
        self.log, self.accelerator, self.global_batch_size = log, accelerator, global_batch_size
        self.flops, self.peak = flops, peak_tflops * 1e12 * accelerator.num_processes
        # In a log file a bar is one line after another.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=flops.schedule.total_steps, initial=first_step, disable=log is None, unit="step", dynamic_ncols=True,
            mininterval=interval, maxinterval=interval, bar_format=BAR_FORMAT, delay=1e-3,
        )  # fmt: skip
        self.started = time.monotonic() - seconds
        self.done, self.phase = first_step, None
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.numbers: dict[str, int] = {}
        self.steps, self.waited, self.operations = 0, 0.0, 0

    def update(self, metrics: dict[str, torch.Tensor], began: float, waited: float) -> None:
        """Take in one step.

        Args:
            began: `time.monotonic()` when it asked for its data.
            waited: seconds until it had them.
        """
        if self.steps == 0:
            self.since = began
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.numbers[name] = self.numbers.get(name, 0) + 1
        operations = self.flops.of_step(self.done) * self.global_batch_size
        self._count_in_phase(began, operations)
        self.steps += 1
        self.waited += waited
        self.operations += operations
        self.done += 1
        self.bar.update()

    def _count_in_phase(self, began: float, operations: int) -> None:
        phase = self.flops.schedule.phase_number(self.done)
        if phase != self.phase:
            self.phase, self.phase_began, self.phase_operations = phase, began, 0
        self.phase_operations += operations

    def seconds_left(self) -> float:
        """Until the end of the schedule, at the speed of this phase, in FLOP/s, since it began or was resumed."""
        speed = self.phase_operations / (time.monotonic() - self.phase_began)
        return self.flops.left(self.done) * self.global_batch_size / speed

    def flush(self, step: int, position: dict[str, Any], rates: dict[str, float], skipped_steps: int) -> None:
        """Write what has come together since the last time; ranks are averaged, counts of codes summed.

        Args:
            step: steps done.
            position: `phase`, `kind` and `iteration`.
            rates: learning rate by side.
        """
        if self.steps == 0:
            return
        means = self._means()
        # The device may be steps behind until its numbers have been asked for.
        seconds = time.monotonic() - self.since
        sides = {name.split("/")[0] for name in means}
        row = {"step": step, **position, "time": round(time.monotonic() - self.started, 2)}
        row |= {"samples": step * self.global_batch_size}
        row |= {"samples_per_second": round(self.steps * self.global_batch_size / seconds, 2)}
        row |= {"data_wait_share": round(self.waited / seconds, 4), "skipped_steps": skipped_steps}
        cached = means.get("codes/cached", 0) * self.steps * self.global_batch_size
        operations = self.operations - (cached and cached * self.flops.codes(position["phase"]))
        speed = operations / seconds * self.flops.share(means.get("input/patches", self.flops.patches))
        row |= {"flops_per_second": _shortened(speed), "mfu": _shortened(speed / self.peak)}
        row |= {"memory_gib": _shortened(peak_memory(self.accelerator.device) / 2**30)}
        row |= means | {f"{side}/lr": rate for side, rate in rates.items() if side in sides}
        if self.log is not None:
            self.log.write(row)
            self.bar.total = self.flops.schedule.total_steps  # fewer, where a phase has ended early
            self.bar.set_description(f"{position['kind']} {position['iteration']}", refresh=False)
            self.bar.set_postfix_str(_shown(row, self.seconds_left()), refresh=False)
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


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held on a CUDA device at most; elsewhere, those that it holds in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _rounded(value: torch.Tensor) -> Any:
    return _shortened(value.tolist())


def _shortened(number: Any) -> Any:
    return [_shortened(entry) for entry in number] if isinstance(number, list) else float(f"{number:.6g}")


def _shown(row: dict[str, Any], seconds_left: float) -> str:
    """What stands beside the bar."""
    losses = [f"{side} loss {row[f'{side}/loss']:.4g}" for side in ("encoder", "tokenizer") if f"{side}/loss" in row]
    speed, wait = f"{row['samples_per_second']:.4g} samples/s", f"wait {row['data_wait_share']:.0%}"
    return ", ".join([*losses, speed, wait, f"left {tqdm.format_interval(seconds_left)}"])


def _flat(row: dict[str, Any]) -> dict[str, float]:
    """Numbers of a row, one entry per codebook."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}/{level + 1}": entry for level, entry in enumerate(value)}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat
