"""Schedule of a run as one state machine: which phases there are, and what follows from a step's number.

Phase, learning rates and what is trained follow from the number of optimizer steps done and, where phases may end by
evidence (`until`), from the lengths of those that did. So a run resumes from a step number and these lengths, and a
schedule is data (`phases` of a recipe):

    phases:
      - {train: encoder, epochs: 140, warmup_epochs: 10, learning_rate: 5.0e-4}   # iteration 0: random projection
      - {train: tokenizer, epochs: 31, warmup_epochs: 2, learning_rate: 2.0e-4}   # iteration 1: distils the encoder
      - {train: encoder, epochs: 140, warmup_epochs: 10, learning_rate: 5.0e-4}   # and so on, as long as wanted
"""

import difflib
import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One entry of a schedule.

    Args:
        train: `encoder`; `tokenizer`; `alternate` (the two in turns, `switch_every` steps each, encoder first); or
            `joint` (the encoder at every step, the tokenizer at every `tokenizer_every`-th with weight
            `tokenizer_loss_weight`).
        steps or epochs, warmup_steps or warmup_epochs: length and linear warm-up; a cosine follows, down to 0.
        learning_rate: of the encoder, or of the tokenizer where that alone is trained.
        tokenizer_learning_rate: of the tokenizer in `alternate` and `joint`; `learning_rate` if not given.
        until: of a phase that trains the encoder alone, as {accuracy_gain: 0.001, over: 2000}: it ends early, when the
            masked accuracy has risen by less than `accuracy_gain` over `over` steps, see [`Plateau`]. Learning rates
            stay those of the full length.
        start: `fresh` (what the phase trains starts anew) or `continue` (from what the phases before left).
        target: what the encoder of this phase predicts (`BridleConfig.target`); that of the recipe if not given.
    """

    train: str
    steps: int = 0
    epochs: float = 0.0
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    learning_rate: float = 5e-4
    tokenizer_learning_rate: float | None = None
    until: dict[str, float] | None = None
    start: str = "fresh"
    target: str | None = None
    switch_every: int = 100
    tokenizer_every: int = 4
    tokenizer_loss_weight: float = 0.2

    @classmethod
    def from_dict(cls, number: int, entry: dict[str, Any]) -> "Phase":
        """Check one entry of a recipe.

        Raises:
            ValueError: an unknown key or a wrong value, naming phase and key.
        """
        names = [item.name for item in fields(cls)]
        for name in entry:
            if name not in names:
                nearest = difflib.get_close_matches(str(name), names, n=1)
                hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
                raise ValueError(f"phases[{number}]: unknown key '{name}'{hint}")
        if entry.get("train") not in ("encoder", "tokenizer", "alternate", "joint"):
            raise ValueError(
                f"phases[{number}]: train is {entry.get('train')!r}: encoder, tokenizer, alternate or joint"
            )
        for item in fields(cls):
            value = entry.get(item.name, item.default)
            if item.name in ("train", "until", "start", "target") or value is item.default:
                continue
            kinds = int if item.type is int else (int, float)
            # Beyond this, a length is no longer exact as a float.
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < 1e15:
                kind = "whole number" if item.type is int else "number"
                raise ValueError(f"phases[{number}]: {item.name} is {value!r}, expected a {kind} of 0 or more")
        phase = cls(**entry)
        if phase.start not in ("fresh", "continue"):
            raise ValueError(f"phases[{number}]: start is {phase.start!r}: fresh or continue")
        if phase.target not in (None, "codes", "patches", "features"):
            raise ValueError(f"phases[{number}]: target is {phase.target!r}: codes, patches or features")
        if phase.target and not (phase.trains_encoder and phase.start == "fresh"):
            raise ValueError(f"phases[{number}]: target is for phases that train an encoder, with start: fresh")
        if phase.until is not None:
            _check_until(number, phase)
        if phase.warmup_steps > 0 and phase.warmup_epochs > 0:
            raise ValueError(f"phases[{number}]: give the warm-up either as warmup_steps or as warmup_epochs")
        if (phase.steps > 0) == (phase.epochs > 0):
            raise ValueError(f"phases[{number}]: give its length, either as steps or as epochs")
        if min(phase.switch_every, phase.tokenizer_every) < 1:
            raise ValueError(f"phases[{number}]: switch_every and tokenizer_every must be at least 1")
        return phase

    @property
    def trains_encoder(self) -> bool:
        return self.train != "tokenizer"

    @property
    def trains_tokenizer(self) -> bool:
        return self.train != "encoder"


def _check_until(number: int, phase: Phase) -> None:
    until = phase.until
    if not isinstance(until, dict) or set(until) != {"accuracy_gain", "over"}:
        raise ValueError(f"phases[{number}]: until is {until!r}: expected {{accuracy_gain: 0.001, over: 2000}}")
    gain, over = until["accuracy_gain"], until["over"]
    if isinstance(gain, bool) or not isinstance(gain, int | float) or not 0 < gain < 1:
        raise ValueError(f"phases[{number}]: until.accuracy_gain is {gain!r}, expected a number over 0 and under 1")
    if isinstance(over, bool) or not isinstance(over, int) or not 1 <= over < 1e15:
        raise ValueError(f"phases[{number}]: until.over is {over!r}, expected a whole number of steps, 1 or more")
    if phase.train != "encoder" or phase.target in ("patches", "features"):
        raise ValueError(f"phases[{number}]: until is for phases of train: encoder, with target: codes")


class Schedule:
    """Phases with their lengths settled; everything is a function of the optimizer step.

    A phase that ends by evidence changes `lengths`, and with it all that follows from it: [`Schedule.end_phase`].

    Args:
        entries: the `phases` of a recipe.
        steps_per_epoch: optimizer steps that one pass over the data takes (need not be whole).
        scale: factor on every phase's length and warm-up, and on `until.over`.
        kmeans: the tokenizer is not trained but fitted to the encoder, at the start of every phase but the first, and,
            in `alternate`, again every `switch_every` steps.

    Raises:
        ValueError: no phases, or a wrong one.
    """

    def __init__(
        self, entries: Iterable[dict[str, Any]], steps_per_epoch: float, scale: float = 1.0, kmeans: bool = False
    ):
        self.phases = [Phase.from_dict(number, entry) for number, entry in enumerate(entries)]
        self.steps_per_epoch, self.kmeans = steps_per_epoch, kmeans
        for number, phase in enumerate(self.phases if kmeans else ()):
            if phase.train not in ("encoder", "alternate") or (phase.train, number) == ("alternate", 0):
                raise ValueError(
                    f"phases[{number}]: train is {phase.train!r}, but tokenizer.tokenizer_type is kmeans: codes are "
                    "fitted to the encoder of an earlier phase, and nothing of them is trained"
                )
        if not self.phases:
            raise ValueError("phases: the schedule is empty; give at least one phase")

        def settle(steps: int, epochs: float) -> int:
            return round((steps or epochs * steps_per_epoch) * scale)

        self.lengths = [max(1, settle(phase.steps, phase.epochs)) for phase in self.phases]
        self.warmups = [settle(phase.warmup_steps, phase.warmup_epochs) for phase in self.phases]
        # What learning rates follow, whenever a phase ends.
        self.full_lengths = tuple(self.lengths)
        self.windows = [phase.until and max(1, settle(phase.until["over"], 0)) for phase in self.phases]

    @property
    def starts(self) -> list[int]:
        """First step of each phase."""
        return [0, *itertools.accumulate(self.lengths[:-1])]

    @property
    def total_steps(self) -> int:
        return sum(self.lengths)

    def end_phase(self, number: int, done: int) -> None:
        """Let phase `number` be over after `done` steps of the run; those after it move up."""
        self.lengths[number] = done - self.starts[number]

    def phase_number(self, step: int) -> int:
        """The phase that optimizer step `step` (from 0) belongs to."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} lies outside of the schedule's {self.total_steps} steps")
        return max(number for number, start in enumerate(self.starts) if start <= step)

    @property
    def before_encoder(self) -> int:
        """How many phases come before the first that trains an encoder: a given teacher teaches in these."""
        return next((number for number, phase in enumerate(self.phases) if phase.trains_encoder), len(self.phases))

    def iteration(self, number: int) -> int:
        """How many tokenizers have been distilled, or fitted, up to and with phase `number`."""
        if self.kmeans:
            return number
        return sum(phase.trains_tokenizer for phase in self.phases[: number + 1])

    def sides(self, step: int) -> tuple[bool, bool]:
        """Whether encoder and tokenizer are trained at this step."""
        number = self.phase_number(step)
        phase, offset = self.phases[number], step - self.starts[number]
        if self.kmeans:
            return True, False
        if phase.train == "alternate":
            encoder_turn = offset // phase.switch_every % 2 == 0
            return encoder_turn, not encoder_turn
        if phase.train == "joint":
            return True, offset % phase.tokenizer_every == 0
        return phase.trains_encoder, phase.trains_tokenizer

    def trains_tokenizer(self, number: int) -> bool:
        return self.phases[number].trains_tokenizer and not self.kmeans

    def fits(self, step: int) -> bool:
        """Whether a k-means tokenizer is fitted before this step."""
        number = self.phase_number(step)
        phase, offset = self.phases[number], step - self.starts[number]
        if not self.kmeans or number == 0:
            return False
        return offset == 0 or (phase.train == "alternate" and offset % phase.switch_every == 0)

    def learning_rates(self, step: int) -> tuple[float, float]:
        """Learning rates of encoder and tokenizer: linear warm-up, then a cosine to 0 at the end of the phase,
        had it its full length."""
        number = self.phase_number(step)
        phase, offset = self.phases[number], step - self.starts[number]
        length = self.full_lengths[number]
        warmup = min(self.warmups[number], length)
        if offset < warmup:
            factor = (offset + 1) / warmup
        else:
            factor = 0.5 * (1.0 + math.cos(math.pi * (offset - warmup) / max(1, length - warmup)))
        tokenizer_rate = phase.learning_rate
        if phase.trains_encoder and phase.tokenizer_learning_rate is not None:
            tokenizer_rate = phase.tokenizer_learning_rate
        return factor * phase.learning_rate, factor * tokenizer_rate

    def describe(self) -> list[dict[str, Any]]:
        """Kind, iteration and steps of each phase, also those of its full length, JSON-serialisable."""
        return [
            {
                "kind": phase.train,
                "iteration": self.iteration(number),
                "steps": self.lengths[number],
                "full_steps": self.full_lengths[number],
                "spec": asdict(phase),
            }
            for number, phase in enumerate(self.phases)
        ]
