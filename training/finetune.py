"""Fine-tune a pretrained encoder into a classifier, on `transformers.Trainer`.

    python training/finetune.py training/recipes/NAME.yaml --model DIR_OR_ID --data DIR_OR_HUB_ID --output_dir OUT

Takes every option of `TrainingArguments` beside its own. OUT is a `from_pretrained` folder of the classifier with its
processor and model card: `pipeline("audio-classification", OUT)`; beside them stand results.json, run.json,
skipped.jsonl and checkpoints/.
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import soxr
import torch
import transformers
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bridle_hf
from model_cards.card import write_card
from training.arguments import ArgumentError, parse_arguments
from training.data import (
    MODALITIES,
    AudioLoader,
    DrawDataset,
    Item,
    MediaError,
    SkippedFiles,
    TooManyBadFiles,
    collate,
    find_items,
    iterate_eval,
    roll_and_gain,
)
from training.labels import Labels, split_by_groups
from training.metrics import METRIC_NAMES, ClassificationMetric
from training.monitoring import write_json
from training.pretrain import git_revision
from training.probe import load_config


logger = logging.getLogger(__name__)

# What opens a classifier and its processor, by modality.
AUTO_CLASSES = {"audio": (AutoModelForAudioClassification, AutoFeatureExtractor)}
BALANCED_STREAM = 3  # of random numbers, beside those of training/data.py
FULL_LENGTH_FRAMES = 1024  # the length that the widths of SpecAugment's time masks are given for
# What a run leaves in its folder beside the saved model; --overwrite removes it.
RUN_FILES = ("results.json", "run.json", "skipped.jsonl", "checkpoints")


@dataclass
class FinetuneArguments:
    """Arguments of `training/finetune.py` beside those of `TrainingArguments`."""

    model: str = field(metadata={"help": "folder or Hub id of a saved encoder"})
    data: str = field(metadata={"help": "folder or Hub id of labelled recordings, images or clips"})
    label_column: str = field(default="label", metadata={"help": "column of the labels; `labels`: several per item"})
    group_column: str = field(default="group", metadata={"help": "column of the groups"})
    label_order: str | None = field(
        default=None, metadata={"help": "csv with index, mid, display_name that numbers the classes (AudioSet)"}
    )
    train_split: str = field(default="train", metadata={"help": "split to train on, where the data has splits"})
    eval_split: str | None = field(
        default=None, metadata={"help": "split to evaluate on (default: validation, else test)"}
    )
    eval_fold: list[str] = field(default_factory=list, metadata={"help": "folds to evaluate on, train on the others"})
    eval_group: list[str] = field(default_factory=list, metadata={"help": "groups to evaluate on"})
    validation_fraction: float = field(
        default=0.0, metadata={"help": "evaluate on this random fraction; of whole groups where items have one"}
    )

    from_scratch: bool = field(default=False, metadata={"help": "random weights: the control"})
    freeze_encoder: bool = field(default=False, metadata={"help": "train the head alone (linear probing)"})
    max_length: int | None = field(
        default=None, metadata={"help": "input length in frames (default: the processor's)"}
    )
    mean: float | None = field(default=None, metadata={"help": "mean of the log-mel (default: the processor's)"})
    std: float | None = field(default=None, metadata={"help": "std of the log-mel (default: the processor's)"})

    layer_decay: float = field(default=1.0, metadata={"help": "learning rate of a layer, relative to the one above"})
    drop_path_rate: float = field(default=0.0, metadata={"help": "stochastic depth of the last layer"})
    patch_dropout: list[float] = field(
        default_factory=lambda: [0.0, 0.0], metadata={"help": "fractions of (time, mel) stripes of patches dropped"}
    )
    mixup_probability: float = field(default=0.0, metadata={"help": "mix this share of the waveforms with another"})
    mixup_alpha: float = field(default=10.0, metadata={"help": "the mix is Beta(alpha, alpha)"})
    mel_mask: int = field(default=0, metadata={"help": "SpecAugment: widest mask in mel bins"})
    time_mask: int = field(default=0, metadata={"help": "SpecAugment: widest mask in frames of a clip of 1024"})
    augment: bool = field(default=False, metadata={"help": "circular shift and gain, Beta(10, 10) + 0.5"})
    balanced_sampling: bool = field(default=False, metadata={"help": "draw items by 1 / frequency of their classes"})
    draws_per_epoch: int | None = field(
        default=None, metadata={"help": "items per epoch (default: as many as there are)"}
    )
    cache_mb: int = field(default=0, metadata={"help": "memory per process for decoded inputs, MiB"})

    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint of output_dir"})
    overwrite: bool = field(default=False, metadata={"help": "remove what a run left in output_dir"})


@dataclass
class FinetuneTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this script."""

    output_dir: str | None = field(default=None, metadata={"help": "folder to write (required)"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept, beside the best"})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "keep the best epoch's model, not the last's"}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of AdamW, on matrices alone"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "of the single-label cross-entropy"})
    seed: int = field(default=0, metadata={"help": "of everything that is random"})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "faster copies to a GPU"})
    # The batches hold what the model takes, and `skipped` for the trainer.
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay false"})


@dataclass
class Task:
    """Who is to be told from whom: the classes, and the items to train and to evaluate on."""

    labels: Labels
    train: list[Item]
    evaluation: list[Item]
    test: list[Item]
    held_out: str  # in words, for results.json
    targets: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)  # by item path

    @property
    def kind(self) -> str:
        return "multi_label" if self.labels.multi_label else "single_label"


def main() -> None:
    args, training_args = parse_arguments(FinetuneArguments, FinetuneTrainingArguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    transformers.set_seed(training_args.seed)
    out, arguments = Path(training_args.output_dir or ""), resolved_arguments(args, training_args)
    try:
        config = load_config(args.model)
        task = make_task(args, config, training_args.seed)
        check_arguments(args, training_args, config, task)
        prepare_folder(out, args, training_args)
        model, processor = load_model(args, training_args, task)
        trainer = make_trainer(args, training_args, task, model, processor, out / "skipped.jsonl")
    except (ValueError, OSError, TooManyBadFiles) as error:
        # Everything up to here is about arguments and data: one line says what is wrong.
        raise ArgumentError(" ".join(str(error).split())) from error
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir) if args.resume else None)
    seconds = time.monotonic() - started
    results = evaluate(trainer, task)
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out)
        processor.save_pretrained(out)
        write_outputs(out, arguments, task, results, seconds)


# ---------------------------------------------------------------------------------------------------------------------
# The task: classes and items
# ---------------------------------------------------------------------------------------------------------------------


def make_task(args: FinetuneArguments, config: Any, seed: int) -> Task:
    """Find the items, hold some out and number the classes.

    Raises:
        ValueError: nothing to evaluate on, an item without label, or a label seen in evaluation only.
    """
    items = find_items(args.data, config.modality, None, args.label_column, args.group_column)
    train, evaluation, test, held_out = split_items(items, args, seed)
    labels = Labels(train, args.label_order)
    if len(labels.names) < 2:
        raise ValueError(
            f"{args.data}: the training items have one class only ({labels.names[0]}): nothing to tell apart"
        )
    task = Task(labels, train, evaluation, test, held_out)
    for part in (train, evaluation, test):
        task.targets |= {item.path: target for item, target in zip(part, labels.encode(part))}
    return task


def split_items(
    items: list[Item], args: FinetuneArguments, seed: int
) -> tuple[list[Item], list[Item], list[Item], str]:
    """(to train on, to evaluate on after each epoch, to test the final model on or [], what is evaluated on in words).

    Raises:
        ValueError: more than one way to hold out is asked for, or none is and the data has no splits.
    """
    asked = [name for name in ("eval_split", "eval_fold", "eval_group", "validation_fraction") if getattr(args, name)]
    if len(asked) > 1:
        raise ValueError(f"--{asked[0]} and --{asked[1]} both say what to evaluate on: give one")
    splits = {item.split for item in items} - {None}
    train = [item for item in items if item.split in (args.train_split, None)]
    if not train:
        raise ValueError(f"{args.data}: no items of split {args.train_split!r}; the splits are {sorted(splits)}")
    if asked and asked[0] != "eval_split":
        train, evaluation, held_out = _hold_out(train, args, seed)
        return train, evaluation, [item for item in items if item.split == "test"], held_out
    split = args.eval_split or next((name for name in ("validation", "test") if name in splits), None)
    evaluation = [item for item in items if item.split == split and split not in (None, args.train_split)]
    if not evaluation:
        raise ValueError(
            f"{args.data}: nothing to evaluate on (its splits: {sorted(splits) or 'none'}); give --eval_split, "
            "--eval_fold, --eval_group or --validation_fraction"
        )
    test = [item for item in items if item.split == "test" != split]
    return train, evaluation, test, f"split {split}"


def _hold_out(items: list[Item], args: FinetuneArguments, seed: int) -> tuple[list[Item], list[Item], str]:
    if args.eval_group:
        return *split_by_groups(items, args.eval_group), f"group {', '.join(args.eval_group)}"
    if args.eval_fold:
        unknown = set(args.eval_fold) - {item.fold for item in items}
        if unknown:
            found = sorted({str(item.fold) for item in items})
            raise ValueError(f"--eval_fold: no items of fold {', '.join(sorted(unknown))}; the folds are {found}")
        rest = [item for item in items if item.fold not in args.eval_fold]
        held_out = [item for item in items if item.fold in args.eval_fold]
        return rest, held_out, f"fold {', '.join(args.eval_fold)}"
    options = {"n_splits": 1, "test_size": args.validation_fraction, "random_state": seed}
    labels, groups = [item.label for item in items], [item.group for item in items]
    if None not in groups:
        chosen = GroupShuffleSplit(**options).split(items, labels, groups)
    elif None not in labels:
        chosen = StratifiedShuffleSplit(**options).split(items, labels)
    else:
        chosen = ShuffleSplit(**options).split(items)
    train, held_out = next(chosen)
    where = f"a random fraction of {args.validation_fraction} (seed {seed})"
    return [items[index] for index in train], [items[index] for index in held_out], where


def check_arguments(
    args: FinetuneArguments, training_args: FinetuneTrainingArguments, config: Any, task: Task
) -> None:
    """Refuse what cannot work, before the first step.

    Raises:
        ValueError: naming the option.
    """
    audio_only = ("max_length", "mean", "std", "mixup_probability", "mel_mask", "time_mask", "augment")
    given = [name for name in audio_only if getattr(args, name)]
    if given and config.modality != "audio":
        raise ValueError(f"--{given[0]} is for audio, but --model {args.model} is for {config.modality}")
    if training_args.label_smoothing_factor and task.labels.multi_label:
        raise ValueError("--label_smoothing_factor is for one label per item, but these items have several")
    if training_args.remove_unused_columns or not 0 <= args.mixup_probability <= 1 or not 0 < args.layer_decay <= 1:
        raise ValueError(
            "--remove_unused_columns must be false, --mixup_probability in [0, 1], --layer_decay in (0, 1]"
        )
    if args.mel_mask > config.num_mel_bins or args.time_mask > FULL_LENGTH_FRAMES:
        raise ValueError(f"--mel_mask must be at most {config.num_mel_bins}, --time_mask at most {FULL_LENGTH_FRAMES}")
    if args.freeze_encoder and (args.drop_path_rate or args.layer_decay != 1 or args.from_scratch):
        raise ValueError("--freeze_encoder leaves nothing for --drop_path_rate, --layer_decay or --from_scratch to do")


# ---------------------------------------------------------------------------------------------------------------------
# Model and folder
# ---------------------------------------------------------------------------------------------------------------------


def load_model(args: FinetuneArguments, training_args: FinetuneTrainingArguments, task: Task) -> tuple[nn.Module, Any]:
    """The classifier, with pretrained weights unless from scratch, and its processor."""
    config = load_config(args.model)
    config.id2label = dict(enumerate(task.labels.names))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = f"{task.kind}_classification"
    config.drop_path_rate, config.patch_dropout = args.drop_path_rate, args.patch_dropout
    # The model smooths, mixed targets too; the Trainer's own smoother would take class numbers only.
    config.label_smoothing, training_args.label_smoothing_factor = training_args.label_smoothing_factor, 0.0
    auto_model, auto_processor = AUTO_CLASSES[config.modality]
    processor = auto_processor.from_pretrained(args.model)
    for name in ("max_length", "mean", "std"):
        if getattr(args, name) is not None:
            setattr(processor, name, getattr(args, name))
    config.max_length = processor.max_length
    config.validate_architecture()
    if args.from_scratch:
        model = auto_model.from_config(config)
    else:
        model = auto_model.from_pretrained(args.model, config=config)
    if args.freeze_encoder:
        model.bridle.requires_grad_(False)
    return model, processor


def prepare_folder(out: Path, args: FinetuneArguments, training_args: FinetuneTrainingArguments) -> None:
    """Make sure that nothing is overwritten unasked, and send the Trainer's checkpoints to OUT/checkpoints.

    Raises:
        ValueError: the folder is not empty, and neither --resume nor --overwrite is given.
    """
    if training_args.output_dir is None:
        raise ValueError("the following arguments are required: --output_dir")
    checkpoints = out / "checkpoints"
    training_args.output_dir = str(checkpoints)
    if training_args.process_index > 0:
        return
    if out.exists() and any(out.iterdir()) and not (args.resume or args.overwrite):
        raise ValueError(f"--output_dir {out} is not empty: give --resume to go on, or --overwrite to start anew")
    if args.resume and not (checkpoints.is_dir() and get_last_checkpoint(checkpoints)):
        raise ValueError(f"--resume: {checkpoints} holds no checkpoint")
    if args.overwrite and not args.resume:
        for path in (out / name for name in RUN_FILES):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    checkpoints.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Samples: augmentation, mixing, and the order in which they are drawn
# ---------------------------------------------------------------------------------------------------------------------


class AudioTrainingLoader(AudioLoader):
    """Read a recording for training: waveform mixup, log-mel, SpecAugment, and the target as `labels`.

    Args:
        feature_extractor, max_frames, cache_bytes: as `AudioLoader` takes them.
        task: its training items are what is mixed in; its targets become `labels`: class numbers, or (with mixup, and
            for several labels per item) rows of class weights.
        args: `augment`, `mixup_probability`, `mixup_alpha`, `mel_mask`, `time_mask`.
    """

    def __init__(self, feature_extractor: Any, max_frames: int, cache_bytes: int, task: Task, args: FinetuneArguments):
        super().__init__(feature_extractor, max_frames, augment=args.augment, cache_bytes=cache_bytes)
        self.task, self.args = task, args

    def __call__(self, item: Item, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        args, target = self.args, self._target(item)
        sample = None
        if args.mixup_probability and rng.random() < args.mixup_probability:
            other = self.task.train[rng.integers(len(self.task.train))]
            weight = float(rng.beta(args.mixup_alpha, args.mixup_alpha))
            try:
                sample = self._mixed(item, other, weight, rng)
                target = weight * target + (1 - weight) * self._target(other)
            except MediaError as error:
                if error.path != other.path:
                    raise
                # The item stays unmixed; the other one is reported when its own turn comes.
        sample = super().__call__(item, rng) if sample is None else sample
        if args.mel_mask or args.time_mask:
            real = int(sample["attention_mask"].sum())
            sample["input_values"] = spec_augment(sample["input_values"], real, args.mel_mask, args.time_mask, rng)
        return {**sample, "labels": target}

    def _target(self, item: Item) -> torch.Tensor:
        target = self.task.targets[item.path]
        if self.args.mixup_probability and not self.task.labels.multi_label:
            return nn.functional.one_hot(target, len(self.task.labels.names)).float()
        return target

    def _mixed(self, item: Item, other: Item, weight: float, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        (first, rate), (second, second_rate) = self.read(item, rng), self.read(other, rng)
        first, second = first.mean(axis=0), second.mean(axis=0)
        if second_rate != rate:
            second = soxr.resample(second, second_rate, rate)
        mixed = mix_waveforms(first, second, weight)[None]
        return self._fit(self.features(roll_and_gain(mixed, rng) if self.augment else mixed, rate), None)


TRAINING_LOADERS = {"audio": AudioTrainingLoader}


def mix_waveforms(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """`weight` parts of `first` and the rest of `second` (samples,), each without its mean; as long as `first`."""
    fitted = np.zeros_like(first)
    fitted[: len(second)] = second[: len(first)] - second.mean()
    return np.float32(weight) * (first - first.mean()) + np.float32(1 - weight) * fitted


def spec_augment(
    values: torch.Tensor, num_real: int, mel_mask: int, time_mask: int, rng: np.random.Generator
) -> torch.Tensor:
    """Set one stripe of mel bins and one of frames to 0, the mean of the data (SpecAugment); on a copy.

    Args:
        values: (frames, mel bins), normalised.
        num_real: frames that are not padding; the stripe of frames lies among them.
        mel_mask: the widest stripe of mel bins.
        time_mask: the widest stripe of frames for a clip of 1024 frames, in proportion for a shorter one.
    """
    values = values.clone()
    widest = round(time_mask * min(num_real, FULL_LENGTH_FRAMES) / FULL_LENGTH_FRAMES)
    for axis, size, most in ((0, num_real, widest), (1, values.shape[1], mel_mask)):
        width = int(rng.integers(most + 1))
        values.narrow(axis, int(rng.integers(size - width + 1)), width).zero_()
    return values


class TrainingDraws(DrawDataset):
    """`DrawDataset` with an epoch's length and, given weights, items drawn with replacement in proportion to them."""

    def __init__(
        self, items: Sequence[Item], load: Any, seed: int, draws_per_epoch: int, weights: np.ndarray | None = None
    ):
        super().__init__(items, load, seed)
        self.draws_per_epoch = draws_per_epoch
        self._cumulative = None if weights is None else np.cumsum(weights / weights.sum())

    def __len__(self) -> int:
        return self.draws_per_epoch

    def index_of(self, draw: int) -> int:
        if self._cumulative is None:
            return super().index_of(draw)
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, draw), spawn_key=(BALANCED_STREAM,)))
        return min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self.items) - 1)


def balanced_weights(targets: torch.Tensor) -> np.ndarray:
    """1 / frequency of an item's class, summed over its classes where it has several (as in the AudioSet recipes).

    Args:
        targets: class numbers (items,), or 0/1 rows (items, classes).
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


class EvaluationItems(Dataset):
    """Every item once, as it is, with its target as `labels`."""

    def __init__(self, items: Sequence[Item], load: AudioLoader, task: Task):
        self.items, self.load, self.task = items, load, task

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        return {**self.load(item), "labels": self.task.targets[item.path], "index": index, "skipped": []}


def collate_samples(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of what the model takes, and `skipped` for the trainer."""
    batch = collate(samples)
    del batch["index"]
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class FinetuneTrainer(Trainer):
    """`Trainer` with layer-wise learning rates, our own order of draws and a ledger of bad files."""

    def __init__(self, *args: Any, layer_decay: float, ledger: SkippedFiles, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layer_decay, self.ledger = layer_decay, ledger
        # The model takes any keyword (for its attention), which the Trainer reads as "divides its loss by itself".
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(
                model or self.model, self.args.learning_rate, self.args.weight_decay, self.layer_decay
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return EpochDraws(len(self.train_dataset))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        skipped = inputs.pop("skipped")
        self.ledger.update(skipped)
        if "labels" not in inputs:
            raise TooManyBadFiles(f"no file of a whole batch could be read; the last is {': '.join(skipped[-1])}")
        return super()._prepare_inputs(inputs)


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


def make_trainer(
    args: FinetuneArguments,
    training_args: FinetuneTrainingArguments,
    task: Task,
    model: nn.Module,
    processor: Any,
    skipped_path: Path,
) -> FinetuneTrainer:
    """The trainer; files of the items to evaluate on are read once here, so that all evaluations see the same ones.

    Raises:
        TooManyBadFiles: more than 10% of them cannot be read.
    """
    ledger = SkippedFiles(skipped_path, len(task.train) + len(task.evaluation) + len(task.test))
    cache_bytes = args.cache_mb << 20
    load = MODALITIES[model.config.modality].loader(processor, processor.max_length, cache_bytes=cache_bytes)
    training_load = TRAINING_LOADERS[model.config.modality](processor, processor.max_length, cache_bytes, task, args)
    task.evaluation = readable(task.evaluation, load, ledger, training_args.dataloader_num_workers)
    task.test = readable(task.test, load, ledger, training_args.dataloader_num_workers)
    weights = balanced_weights(task.labels.encode(task.train)) if args.balanced_sampling else None
    draws = TrainingDraws(
        task.train,
        training_load,
        training_args.seed,
        args.draws_per_epoch or len(task.train),
        weights,
    )
    if training_args.metric_for_best_model == "auto":
        training_args.metric_for_best_model = METRIC_NAMES[task.kind]
    metric = ClassificationMetric(config_name=task.kind, keep_in_memory=True)
    return FinetuneTrainer(
        model=model,
        args=training_args,
        train_dataset=draws,
        eval_dataset=EvaluationItems(task.evaluation, load, task),
        data_collator=collate_samples,
        processing_class=processor,
        compute_metrics=lambda outputs: metric.compute(
            predictions=outputs.predictions, references=outputs.label_ids.astype(np.int64)
        ),
        layer_decay=args.layer_decay,
        ledger=ledger,
    )


def readable(items: list[Item], load: AudioLoader, ledger: SkippedFiles, num_workers: int) -> list[Item]:
    """The items that can be read; the others go to `ledger`."""
    if not items:
        return []
    kept = [index for indices, _ in iterate_eval(items, load, 64, ledger, num_workers) for index in indices]
    return [items[index] for index in kept]


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(trainer: FinetuneTrainer, task: Task) -> dict[str, Any]:
    """What results.json holds: the final model's figures, how they came about, and the history."""
    name = METRIC_NAMES[task.kind]
    history = [
        {"epoch": entry["epoch"], name: entry[f"eval_{name}"], "loss": entry["eval_loss"]}
        for entry in trainer.state.log_history
        if f"eval_{name}" in entry
    ]
    found = trainer.evaluate()
    is_best = trainer.args.load_best_model_at_end
    results = {
        "metric": name,
        "evaluation": {name: found[f"eval_{name}"], "loss": found["eval_loss"]},
        "evaluated_on": task.held_out,
        # A best epoch chosen on the very items that it is measured on flatters itself: say so.
        "epoch": "the best, chosen on the same items" if is_best else "the last",
        "items": {"train": len(task.train), "evaluation": len(task.evaluation), "test": len(task.test)},
        "classes": len(task.labels.names),
        "skipped_files": len(trainer.ledger.reasons),
        "history": history,
    }
    if task.test:
        test_items = EvaluationItems(task.test, trainer.eval_dataset.load, task)
        tested = trainer.evaluate(test_items, metric_key_prefix="test")
        results["test"] = {name: tested[f"test_{name}"], "loss": tested["test_loss"]}
    return results


def resolved_arguments(args: FinetuneArguments, training_args: FinetuneTrainingArguments) -> dict[str, Any]:
    """Our own arguments, and those of `TrainingArguments` that are not at the values it has by itself."""
    stock = TrainingArguments(output_dir=training_args.output_dir).to_dict()
    ours = {entry.name for entry in fields(FinetuneTrainingArguments) if entry.name in vars(FinetuneTrainingArguments)}
    given = {k: v for k, v in training_args.to_dict().items() if k in ours or v != stock[k]}
    return json.loads(json.dumps(vars(args) | given, default=str))


def write_outputs(out: Path, arguments: dict[str, Any], task: Task, results: dict[str, Any], seconds: float) -> None:
    """results.json, run.json and the model card."""
    measured = {
        "metric": results["metric"],
        "value": results["evaluation"][results["metric"]],
        "split": results["evaluated_on"],
        "note": f"epoch: {results['epoch']}",
    }
    run = {
        "arguments": arguments,
        "data": arguments["data"],
        "samples": len(task.train),
        "seed": arguments["seed"],
        "seconds": round(seconds, 1),
        "versions": {
            "bridle_hf": bridle_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "git_revision": git_revision(),
        "results": {"audio classification": measured},
    }
    write_json(out / "results.json", results)
    write_json(out / "run.json", run)
    write_card(out, run)
    print(f"{measured['metric']} {measured['value']:.4f} on {measured['split']}; the classifier is in {out}")


if __name__ == "__main__":
    main()
