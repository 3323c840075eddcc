"""Levels of codes in the loss: all of them from the start, or one more as soon as the last one is predictable."""

import torch
from accelerate import Accelerator


# Of the moving average of a level's accuracy: a single batch should not let the next level in.
RATE = 0.1


class Levels:
    """Counts the levels of codes that an encoder's loss is over.

    Args:
        accelerator: of the run.
        number: of all levels.
        join_at: masked accuracy of the last level at which the next one joins; 0: all are in it from the start.

    Attributes:
        joined: levels in the loss now.
    """

    def __init__(self, accelerator: Accelerator, number: int, join_at: float):
        self.accelerator, self.number, self.join_at = accelerator, number, join_at
        self.restart()

    def restart(self) -> None:
        """As it is for a fresh encoder."""
        self.joined, self.accuracy = 1 if self.join_at else self.number, 0.0

    def update(self, accuracy: torch.Tensor) -> None:
        """Take in a step's accuracy; all processes must call it.

        Args:
            accuracy: (number,), what this process adds to the mean over processes.
        """
        last = float(self.accelerator.reduce(accuracy, "mean")[self.joined - 1])
        self.accuracy += RATE * (last - self.accuracy)
        if self.accuracy >= self.join_at and self.joined < self.number:
            self.joined, self.accuracy = self.joined + 1, 0.0

    def state_dict(self) -> list[float]:
        """JSON-serialisable."""
        return [self.joined, self.accuracy]

    def load_state_dict(self, state: list[float]) -> None:
        self.joined, self.accuracy = int(state[0]), state[1]
