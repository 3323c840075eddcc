"""Callbacks of fine-tuning: stop at a signal, save where a run can go on, skip non-finite steps, take time."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from bridle_hf.common.errors import MAX_SKIPPED_IN_A_ROW, NonFiniteError
from bridle_hf.common.signals import StopRequest
from bridle_hf.common.skipped import SkippedSteps
from bridle_hf.finetuning.checkpoints import path_of


class StopAndResume(TrainerCallback):
    """Save and stop when a signal asks for it, so that the run goes on as if nothing had been.

    At the end of an epoch the checkpoint follows the epoch's evaluation: a run resumed from it begins the next one.
    """

    def __init__(self, trainer: Trainer, stop: StopRequest):
        self.trainer, self.stop = trainer, stop
        self.stopped = self.saves_at_epoch_end = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Where it lies now: the folder may have been moved since it was saved.
        best = path_of(Path(args.output_dir), state.best_global_step) if state.best_global_step else None
        state.best_model_checkpoint = str(best) if best and best.is_dir() else None

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # The Trainer's own way does not reach the sampler of several processes that resume within an epoch.
        self.trainer.draws.set_epoch(int(state.epoch))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._ask(state, control)
        if _epoch_ends(state):
            self.saves_at_epoch_end = control.should_save or self.stopped
            control.should_save = False
        elif self.stopped:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.stopped and not _epoch_ends(state):
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.saves_at_epoch_end:
            control.should_save = True
        self.saves_at_epoch_end = False

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # A signal during evaluation or save needs no further step.
        self._ask(state, control)

    def _ask(self, state: TrainerState, control: Any) -> None:
        if self.stop.is_made(self.trainer.accelerator) and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True


def _epoch_ends(state: TrainerState) -> bool:
    return float(state.epoch).is_integer()


class SkipNonFinite(TrainerCallback, ExportableState):
    """Leave the weights alone in a step whose gradient is not finite, as pretraining does, count it, and warn.

    Raises:
        NonFiniteError: by a step: the 20th such step in a row, or more than 20 of the last 200.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.skipped_steps = self.skipped_in_a_row = 0
        self.recent = SkippedSteps()

    def state(self) -> dict[str, Any]:
        attributes = {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}
        return {"args": {}, "attributes": attributes | {"recent": self.recent.state_dict()}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Go on counting where the checkpoint has been."""
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.skipped_steps, self.skipped_in_a_row = saved["skipped_steps"], saved["skipped_in_a_row"]
        self.recent.load_state_dict(saved["recent"])

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self.skipped_in_a_row = 0
            return
        # An optimizer passes over parameters without a gradient.
        model.zero_grad(set_to_none=True)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"loss or gradient not finite in {self.skipped_in_a_row} steps in a row, up to {state.global_step}: "
                f"lower --learning_rate, or look into the files of the last: {', '.join(self.trainer.batch_files)}"
            )
        self.recent.update(state.global_step, True, self.trainer.batch_files)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.recent.check_whole_run(self.skipped_steps, state.global_step)


class Clock(TrainerCallback, ExportableState):
    """How long training has taken, in all sessions of a run as far as its checkpoints know of them."""

    def __init__(self):
        self.before, self.started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Go on where the checkpoint has been; those of older versions do not say."""
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {"args": {}, "attributes": {"seconds": 0.0}})
        self.before, self.started = saved["attributes"]["seconds"], time.monotonic()
