"""Fine-tuning on `transformers.Trainer`: samples in order, optimizer groups, bad input.

TrainingDraws (sample of a draw) ─► EpochDraws ─► collate ─► FinetuneTrainer ◄─ EvaluationSamples
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer

from bridle_hf.common.errors import NonFiniteError, TooManyBadFiles
from bridle_hf.common.length_buckets import in_batch_order, parts_by_length
from bridle_hf.common.manifest import CheckpointError, write_manifest
from bridle_hf.common.signals import StopRequest, leave_signals_to_parent
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.batches import DrawDataset
from bridle_hf.data.loaders import Load, VideoLoader
from bridle_hf.data.sample import Sample
from bridle_hf.finetuning.callbacks import Clock, SkipNonFinite, StopAndResume
from bridle_hf.finetuning.checkpoints import path_of, remove_old


BALANCED_STREAM = 3  # of random numbers, beside those of data/batches.py


# --- Samples ---


class TrainingDraws(DrawDataset):
    """`DrawDataset` with an epoch's length and, given weights, samples drawn with replacement in proportion to them.

    Each sample drawn gives `draws_per_sample` draws in a row (repeated augmentation), each with its own random
    numbers.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        load: Load,
        seed: int,
        draws_per_epoch: int,
        weights: np.ndarray | None = None,
        draws_per_sample: int = 1,
    ):
        super().__init__(samples, load, seed)
        self.draws_per_epoch, self.draws_per_sample = draws_per_epoch, draws_per_sample
        self._cumulative = None if weights is None else np.cumsum(weights / weights.sum())

    def __len__(self) -> int:
        return self.draws_per_epoch

    def index_of(self, draw: int) -> int:
        draw //= self.draws_per_sample
        if self._cumulative is None:
            return super().index_of(draw)
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, draw), spawn_key=(BALANCED_STREAM,)))
        return min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self.samples) - 1)


def balanced_weights(targets: torch.Tensor) -> np.ndarray:
    """1 / frequency of a sample's class, summed over its classes where it has several (as in the AudioSet recipes).

    Args:
        targets: class numbers (samples,), or 0/1 rows (samples, classes).
    """
    rows = nn.functional.one_hot(targets) if targets.dim() == 1 else targets
    return (rows.double() @ (1.0 / rows.sum(dim=0).clamp(min=1).double())).numpy()


class EpochDraws(Sampler):
    """The draws of one epoch after the other, so that a resumed run sees what an unbroken one would have."""

    def __init__(self, draws_per_epoch: int):
        self.draws_per_epoch, self.epoch = draws_per_epoch, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.draws_per_epoch

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.draws_per_epoch
        return iter(range(first, first + self.draws_per_epoch))


class EvaluationSamples(Dataset):
    """Every sample once, as `load` reads it, with its target (by sample path) as `labels`."""

    def __init__(self, samples: Sequence[Sample], load: Load, targets: dict[str, torch.Tensor]):
        self.samples, self.load, self.targets = samples, load, targets

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {**self.load(sample, None), "labels": self.targets[sample.path], "index": index, "skipped": []}


@dataclass(frozen=True)
class ViewLoader:
    """Several views of a video, as `views` (clips * crops, frames, channels, height, width)."""

    load: VideoLoader
    num_clips: int
    num_crops: int

    def __call__(self, sample: Sample, rng: None = None) -> dict[str, torch.Tensor]:
        return {"views": self.load.views(sample, self.num_clips, self.num_crops)}


# --- Training ---


class FinetuneTrainer(Trainer):
    """`Trainer` with layer-wise learning rates, our own order of draws, a ledger of bad files and whole checkpoints.

    Args:
        stop: signals that end the training in good order; entered by who trains.
        loader_timeout: seconds that loader workers may take for a batch; 0: any time.
    """

    def __init__(
        self,
        *args: Any,
        layer_decay: float,
        ledger: SkippedFiles,
        stop: StopRequest,
        loader_timeout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.layer_decay, self.ledger, self.loader_timeout = layer_decay, ledger, loader_timeout
        self.draws = EpochDraws(len(self.train_dataset))
        self.batch_files: list[str] = []  # of the step at hand, as far as this process has them
        self.stop_and_resume = StopAndResume(self, stop)
        self.skip_non_finite = SkipNonFinite(self)
        self.clock = Clock()
        for callback in (self.stop_and_resume, self.skip_non_finite, self.clock):
            self.add_callback(callback)
        # The model takes any keyword (for its attention), which the Trainer reads as "divides its loss by itself".
        self.model_accepts_loss_kwargs = False
        # The Trainer would remove checkpoints before the newest is whole, and the newest in the end.
        self.keep_last, self.args.save_total_limit = self.args.save_total_limit, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(
                model or self.model, self.args.learning_rate, self.args.weight_decay, self.layer_decay
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.draws

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        # What is random about a sample hangs on its draw alone, so that workers need no seed of the Trainer's.
        for entry in (loader, getattr(loader, "base_dataloader", loader)):
            entry.worker_init_fn = leave_signals_to_parent
            entry.timeout = self.loader_timeout
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, number = super().get_batch_samples(*args, **kwargs)
        samples = self.train_dataset.samples
        self.batch_files = [samples[index].path for batch in batches for index in batch["index"].tolist()]
        return batches, number

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's checkpoint, there whole or not at all; older ones are removed last.

        Raises:
            CheckpointError: the file system refused; checkpoints written before are untouched.
        """
        folder, step = Path(self.args.output_dir), self.state.global_step
        target = path_of(folder, step)
        try:
            if self.args.should_save:
                shutil.rmtree(target, ignore_errors=True)  # what a kill has left
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(target)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of the three, by who writes
            shutil.rmtree(target, ignore_errors=True)
            raise CheckpointError(
                f"cannot write the checkpoint {target}: {error}; the one before is intact"
            ) from error
        if self.args.should_save:
            remove_old(folder, step, self.state.best_global_step, self.keep_last)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        skipped = inputs.pop("skipped")
        inputs.pop("index", None)
        self.ledger.update(skipped)
        if "labels" not in inputs:
            raise TooManyBadFiles(f"no file of a whole batch could be read; the last is {': '.join(skipped[-1])}")
        return super()._prepare_inputs(inputs)

    def evaluate(self, eval_dataset: Dataset | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.evaluated = eval_dataset or self.eval_dataset
        return super().evaluate(eval_dataset, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """Where a batch holds several `views` of each sample: the mean loss, and the mean of the probabilities.

        Raises:
            NonFiniteError: the model's output is not: names the files.
        """
        indices = inputs["index"].tolist()
        loss, scores, labels = self._predict(model, inputs, *args, **kwargs)
        bad = (~torch.isfinite(scores).flatten(1).all(dim=1)).tolist()
        if any(bad):
            files = [self.evaluated.samples[index].path for index, is_bad in zip(indices, bad) if is_bad]
            names = ", ".join(files)
            raise NonFiniteError(f"the classifier's output is not finite for {names}: lower --learning_rate")
        return loss, scores, labels

    def _predict(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        # Labels of time steps are for all of them.
        if "attention_mask" in inputs and inputs["labels"].dim() < 3:
            return self._predict_by_length(model, inputs, *args, **kwargs)
        if "views" not in inputs:
            return super().prediction_step(model, inputs, *args, **kwargs)
        views, name = inputs.pop("views"), self.model.main_input_name
        # One after the other: all at once are many times the batch that was asked for.
        steps = [super(FinetuneTrainer, self).prediction_step(model, {**inputs, name: view}, *args, **kwargs)
                 for view in views.unbind(1)]  # fmt: skip
        losses, logits, labels = zip(*steps)
        multi_label = self.model.config.problem_type == "multi_label_classification"
        probabilities = [entry.sigmoid() if multi_label else entry.softmax(dim=-1) for entry in logits]
        return torch.stack(losses).mean(), torch.stack(probabilities).mean(dim=0), labels[0]

    def _predict_by_length(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """Clips of similar length together; the loss is a mean over clips."""
        name, found, steps = self.model.main_input_name, [], []
        for places, values, mask in parts_by_length(inputs[name], inputs["attention_mask"], self.model.config):
            part = {**inputs, name: values, "attention_mask": mask, "labels": inputs["labels"][places]}
            found.append(places)
            steps.append(super().prediction_step(model, part, *args, **kwargs))
        losses, logits, labels = zip(*steps)
        loss = sum(loss * len(places) for loss, places in zip(losses, found)) / len(inputs[name])
        return loss, in_batch_order(found, logits), in_batch_order(found, labels)


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: the rate falls by `layer_decay` with each layer below the head; weight decay on matrices only.

    The embeddings are layer 0, then come the encoder's layers; its last norm belongs to the head.
    """
    top = len(model.bridle.layers) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = top
        if ".embeddings." in name:
            depth = 0
        elif ".layers." in name:
            depth = 1 + int(name.split(".layers.")[1].split(".")[0])
        is_matrix = parameter.dim() == 2
        group = groups.setdefault(
            (depth, is_matrix),
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (top - depth),
                "weight_decay": weight_decay if is_matrix else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
