"""Plateau of the masked accuracy: the evidence by which a phase with `until` ends."""

from typing import Any

import torch
from accelerate import Accelerator

from bridle_hf.interleaving.schedule import Schedule


class Plateau:
    """Watches the masked accuracy of a phase: the mean over levels, window by window of `until.over` steps.

    Windows do not overlap, and the first begins after the warm-up. The phase is over when the mean of a window is
    less than `until.accuracy_gain` above that of the window before, after two windows at the earliest. A step
    that is skipped has no accuracy; a window of such steps alone decides nothing.

    The processes exchange their sums at the end of a window and for a checkpoint, not in between.

    Args:
        accelerator, schedule: of the run; the schedule's phase `number` has `until`.
    """

    def __init__(self, accelerator: Accelerator, schedule: Schedule, number: int):
        self.accelerator = accelerator
        self.gain, self.window = schedule.phases[number].until["accuracy_gain"], schedule.windows[number]
        self.begin = schedule.starts[number] + schedule.warmups[number]
        self.before: float | None = None
        self._load_sums(0.0, 0)

    def _load_sums(self, total: float, count: int) -> None:
        # float64 holds sums of float32 numbers without rounding, in whatever order: a resumed run decides alike.
        self.total = torch.tensor(total, dtype=torch.float64, device=self.accelerator.device)
        self.count = count

    def update(self, done: int, metrics: dict[str, torch.Tensor]) -> bool:
        """Take in the metrics of the last of `done` steps; whether the phase is over. All processes must call it."""
        if done <= self.begin:
            return False
        if metrics:
            self.total += metrics["encoder/accuracy"].double().mean()
            self.count += 1
        if (done - self.begin) % self.window or not self.count:
            return False
        mean = self._sum() / self.count
        over = self.before is not None and mean - self.before < self.gain
        self.before = mean
        self._load_sums(0.0, 0)
        return over

    def _sum(self) -> float:
        """Over processes, whose mean is the accuracy of the whole batch."""
        return float(self.accelerator.reduce(self.total, "sum")) / self.accelerator.num_processes

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable; all processes must call it."""
        return {"total": self._sum(), "count": self.count, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._load_sums(state["total"], state["count"])
        self.before = state["before"]
