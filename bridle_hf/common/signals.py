"""Signals that end a run in good order: the step is finished, a checkpoint is written, the exit status is 0.

Queue systems send SIGTERM or SIGUSR1 before they take a machine away, and start the same command again later: with
`--resume`, the run goes on where it was.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import time
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate import Accelerator


logger = logging.getLogger(__name__)

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
# A launcher passes on the SIGINT that the terminal has already sent to all: that is one press of Ctrl-C, not two.
SAME_PRESS_SECONDS = 0.5
# Launchers, by a word of the command that runs them.
LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}


class StopRequest:
    """Takes SIGTERM, SIGUSR1 and SIGINT as the wish to stop at the next step; a second SIGINT stops at once.

    So is the end of the launcher, where one started this process: `accelerate launch` of one process passes no signal
    on, and would leave the run behind.
    """

    def __init__(self):
        self._launcher = find_launcher()
        self.received: signal.Signals | None = None
        self._interrupted_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > SAME_PRESS_SECONDS:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        if self.received is None:
            self.received = signal.Signals(number)
            logger.warning("%s: stopping at the next step; a second Ctrl-C stops at once", self.received.name)

    def is_made(self, accelerator: Accelerator) -> bool:
        """Whether any process has been asked to stop: the same answer in all of them, all of which must ask."""
        if self._launcher is not None and os.getppid() != self._launcher:
            logger.warning("the launcher has ended: stopping at the next step")
            self._launcher = None
            self.received = self.received or signal.SIGTERM
        asked = torch.tensor(float(self.received is not None), device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum") > 0)


def find_launcher() -> int | None:
    """The process that started this one, if it is a launcher."""
    parent = psutil.Process().parent()
    try:
        # Such as: python /usr/bin/accelerate launch ..., or python -m torch.distributed.run ...
        command = parent.cmdline()[:3] if parent else []
    except psutil.Error:
        return None
    return parent.pid if any(os.path.basename(word) in LAUNCHERS for word in command) else None


def leave_signals_to_parent(worker: int) -> None:
    """Make a loader process outlive the signals that a whole process group gets; its parent decides when it ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """End the loader processes of a process that an error ends: it would send them a SIGTERM, and wait for ever."""
    if children := [child for child in multiprocessing.active_children() if child.daemon]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for child in children:
            child.terminate()
        for child in children:
            child.join(timeout=1)
            child.kill()
