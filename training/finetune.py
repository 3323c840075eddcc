"""Fine-tune a pretrained encoder into a classifier, on `transformers.Trainer`.

    python training/finetune.py training/recipes/NAME.yaml --model DIR_OR_ID --data DIR_OR_HUB_ID --output_dir OUT

Takes every option of `TrainingArguments` beside its own. OUT is a `from_pretrained` folder of the classifier with its
processor and model card: `pipeline("audio-classification", OUT)`, or image, or video; beside them stand results.json,
run.json, skipped.jsonl and checkpoints/.
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
import torch
import transformers
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bridle_hf
from model_cards.card import write_card
from training.arguments import ArgumentError, Mapping, parse_arguments
from training.augmentation import FULL_LENGTH_FRAMES, RAND_AUGMENT_MAX, TRAINING_LOADERS, TrainingLoader
from training.data import DrawDataset, SkippedFiles, TooManyBadFiles, collate, find_items, iterate_eval
from training.labels import Labels, split_by_groups
from training.media import Load, VideoLoader, load_config, load_processor, make_item_loader
from training.metrics import METRIC_NAMES, TOP5, ClassificationMetric
from training.monitoring import git_revision, write_json
from training.reading import Item


logger = logging.getLogger(__name__)

# What opens a classifier, by modality.
AUTO_MODELS = {
    "audio": AutoModelForAudioClassification,
    "image": AutoModelForImageClassification,
    "video": AutoModelForVideoClassification,
}
# Options that fit some modalities alone.
OPTIONS_OF = {
    ("audio",): ("max_length", "mean", "std", "mel_mask", "time_mask"),
    ("image", "video"): ("rand_augment", "random_erasing", "cutmix_probability"),
    ("video",): ("eval_clips", "eval_crops"),
}
BALANCED_STREAM = 3  # of random numbers, beside those of training/data.py
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
    loader: Mapping = field(
        default_factory=dict,
        metadata={"help": "arguments of the image or video loader, as {stride: 4, min_crop: 0.2, flip: false}"},
    )
    augment: bool = field(
        default=False,
        metadata={"help": "audio: circular shift and gain, Beta(10, 10) + 0.5; image, video: random crop and flip"},
    )
    mixup_probability: float = field(default=0.0, metadata={"help": "mix this share of the inputs with another"})
    mixup_alpha: float = field(default=10.0, metadata={"help": "the mix is Beta(alpha, alpha)"})
    mel_mask: int = field(default=0, metadata={"help": "SpecAugment: widest mask in mel bins"})
    time_mask: int = field(default=0, metadata={"help": "SpecAugment: widest mask in frames of a clip of 1024"})
    cutmix_probability: float = field(default=0.0, metadata={"help": "paste a box of another into this share"})
    rand_augment: float = field(default=0.0, metadata={"help": "magnitude of RandAugment, up to 10; 0: none"})
    random_erasing: float = field(default=0.0, metadata={"help": "erase a rectangle of this share of the inputs"})
    balanced_sampling: bool = field(default=False, metadata={"help": "draw items by 1 / frequency of their classes"})
    draws_per_epoch: int | None = field(
        default=None, metadata={"help": "samples per epoch (default: samples_per_item of each item)"}
    )
    samples_per_item: int = field(default=1, metadata={"help": "samples drawn of an item in a row, each at random"})
    eval_clips: int = field(default=1, metadata={"help": "clips per film in the last evaluation, spread over it"})
    eval_crops: int = field(default=1, metadata={"help": "crops per clip in the last evaluation, side by side"})
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
        model, processor = load_model(args, training_args, task)
        loaders = make_loaders(args, model.config, processor, task)
        # Nothing that could refuse the arguments follows --overwrite's deletion.
        prepare_folder(out, args, training_args)
        trainer = make_trainer(args, training_args, task, model, processor, loaders, out / "skipped.jsonl")
    except (ValueError, OSError, TooManyBadFiles) as error:
        # Everything up to here is about arguments and data: one line says what is wrong.
        raise ArgumentError(" ".join(str(error).split())) from error
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir) if args.resume else None)
    seconds = time.monotonic() - started
    results = evaluate(trainer, task, loaders.final, args.eval_clips * args.eval_crops)
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out)
        processor.save_pretrained(out)
        write_outputs(out, arguments, config.modality, task, results, seconds)


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
    unset = {entry.name: entry.default for entry in fields(args)}
    for modalities, names in OPTIONS_OF.items():
        for name in names if config.modality not in modalities else ():
            if getattr(args, name) != unset[name]:
                suited = " and ".join(modalities)
                raise ValueError(f"--{name} is for {suited}, but --model {args.model} is for {config.modality}")
    if training_args.label_smoothing_factor and task.labels.multi_label:
        raise ValueError("--label_smoothing_factor is for one label per item, but these items have several")
    if training_args.remove_unused_columns or not 0 < args.layer_decay <= 1:
        raise ValueError("--remove_unused_columns must be false, --layer_decay in (0, 1]")
    _check_augmentation(args, config)
    if args.freeze_encoder and (args.drop_path_rate or args.layer_decay != 1 or args.from_scratch):
        raise ValueError("--freeze_encoder leaves nothing for --drop_path_rate, --layer_decay or --from_scratch to do")


def _check_augmentation(args: FinetuneArguments, config: Any) -> None:
    ranges = {
        "mixup_probability": 1, "cutmix_probability": 1 - args.mixup_probability, "random_erasing": 1,
        "rand_augment": RAND_AUGMENT_MAX, "mel_mask": config.num_mel_bins, "time_mask": FULL_LENGTH_FRAMES,
    }  # fmt: skip
    for name, most in ranges.items():
        if not 0 <= getattr(args, name) <= most:
            raise ValueError(f"--{name} must be at most {most:g} and not negative, got {getattr(args, name)}")
    for name in ("samples_per_item", "eval_clips", "eval_crops"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    random_views = [name for name in ("min_crop", "flip") if name in args.loader]
    if not args.augment and (args.rand_augment or random_views):
        name = "rand_augment" if args.rand_augment else f"loader.{random_views[0]}"
        raise ValueError(f"--{name} changes random views: give --augment too")


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
    auto_model = AUTO_MODELS[config.modality]
    processor = load_processor(args.model, config)
    for name in ("max_length", "mean", "std"):
        if getattr(args, name) is not None:
            setattr(processor, name, getattr(args, name))
    config.max_length = getattr(processor, "max_length", config.max_length)
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
# The order in which samples are drawn
# ---------------------------------------------------------------------------------------------------------------------


class TrainingDraws(DrawDataset):
    """`DrawDataset` with an epoch's length and, given weights, items drawn with replacement in proportion to them.

    Each item drawn gives `samples_per_item` draws in a row (repeated augmentation), each with its own random numbers.
    """

    def __init__(
        self,
        items: Sequence[Item],
        load: Load,
        seed: int,
        draws_per_epoch: int,
        weights: np.ndarray | None = None,
        samples_per_item: int = 1,
    ):
        super().__init__(items, load, seed)
        self.draws_per_epoch, self.samples_per_item = draws_per_epoch, samples_per_item
        self._cumulative = None if weights is None else np.cumsum(weights / weights.sum())

    def __len__(self) -> int:
        return self.draws_per_epoch

    def index_of(self, draw: int) -> int:
        draw //= self.samples_per_item
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
    """Every item once, as `load` reads it, with its target as `labels`."""

    def __init__(self, items: Sequence[Item], load: Load, task: Task):
        self.items, self.load, self.task = items, load, task

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        return {**self.load(item, None), "labels": self.task.targets[item.path], "index": index, "skipped": []}


@dataclass(frozen=True)
class ViewLoader:
    """Several views of a film, as `views` (clips * crops, frames, channels, height, width)."""

    load: VideoLoader
    num_clips: int
    num_crops: int

    def __call__(self, item: Item, rng: None = None) -> dict[str, torch.Tensor]:
        return {"views": self.load.views(item, self.num_clips, self.num_crops)}


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

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """Where a batch holds several `views` of each item: the mean loss, and the mean of the probabilities."""
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


@dataclass(frozen=True)
class Loaders:
    """What reads items: to train on, to evaluate on after an epoch, and to evaluate on in the end."""

    training: TrainingLoader
    epoch: Load
    final: Load


def make_loaders(args: FinetuneArguments, config: Any, processor: Any, task: Task) -> Loaders:
    """The loaders that the arguments ask for.

    Raises:
        ValueError: arguments that the modality's loader does not take.
    """
    load, random_load = (
        make_item_loader(config, processor, args.loader, augment, args.cache_mb << 20)
        for augment in (False, args.augment)
    )
    training_loader = TRAINING_LOADERS[config.modality]
    return Loaders(
        training_loader(random_load, task.train, task.targets, len(task.labels.names), args),
        load,
        ViewLoader(load, args.eval_clips, args.eval_crops) if args.eval_clips * args.eval_crops > 1 else load,
    )


def make_trainer(
    args: FinetuneArguments,
    training_args: FinetuneTrainingArguments,
    task: Task,
    model: nn.Module,
    processor: Any,
    loaders: Loaders,
    skipped_path: Path,
) -> FinetuneTrainer:
    """The trainer; files of the items to evaluate on are read once here, so that all evaluations see the same ones.

    Raises:
        TooManyBadFiles: more than 10% of them cannot be read.
    """
    ledger = SkippedFiles(skipped_path, len(task.train) + len(task.evaluation) + len(task.test))
    # By the loader that reads the most of a file.
    task.evaluation = readable(task.evaluation, loaders.final, ledger, training_args.dataloader_num_workers)
    task.test = readable(task.test, loaders.final, ledger, training_args.dataloader_num_workers)
    draws = TrainingDraws(
        task.train,
        loaders.training,
        training_args.seed,
        args.draws_per_epoch or len(task.train) * args.samples_per_item,
        balanced_weights(task.labels.encode(task.train)) if args.balanced_sampling else None,
        args.samples_per_item,
    )
    if training_args.metric_for_best_model == "auto":
        training_args.metric_for_best_model = METRIC_NAMES[task.kind]
    metric = ClassificationMetric(config_name=task.kind, keep_in_memory=True)
    return FinetuneTrainer(
        model=model,
        args=training_args,
        train_dataset=draws,
        eval_dataset=EvaluationItems(task.evaluation, loaders.epoch, task),
        data_collator=collate_samples,
        processing_class=processor,
        compute_metrics=lambda outputs: metric.compute(
            predictions=outputs.predictions, references=outputs.label_ids.astype(np.int64)
        ),
        layer_decay=args.layer_decay,
        ledger=ledger,
    )


def readable(items: list[Item], load: Load, ledger: SkippedFiles, num_workers: int) -> list[Item]:
    """The items that can be read; the others go to `ledger`."""
    if not items:
        return []
    # Views of whole films are large.
    batch_size = 2 if isinstance(load, ViewLoader) else 64
    kept = [index for indices, _ in iterate_eval(items, load, batch_size, ledger, num_workers) for index in indices]
    return [items[index] for index in kept]


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(trainer: FinetuneTrainer, task: Task, load: Load, views_per_item: int) -> dict[str, Any]:
    """What results.json holds: the final model's figures, how they came about, and the history."""
    name = METRIC_NAMES[task.kind]
    history = [
        {"epoch": entry["epoch"], **_figures(entry, "eval")}
        for entry in trainer.state.log_history
        if f"eval_{name}" in entry
    ]
    is_best = trainer.args.load_best_model_at_end
    results = {
        "metric": name,
        "evaluation": _figures(trainer.evaluate(EvaluationItems(task.evaluation, load, task)), "eval"),
        "evaluated_on": task.held_out,
        # A best epoch chosen on the very items that it is measured on flatters itself: say so.
        "epoch": "the best, chosen on the same items" if is_best else "the last",
        "views_per_item": views_per_item,
        "items": {"train": len(task.train), "evaluation": len(task.evaluation), "test": len(task.test)},
        "classes": len(task.labels.names),
        "skipped_files": len(trainer.ledger.reasons),
        "history": history,
    }
    if task.test:
        test_items = EvaluationItems(task.test, load, task)
        results["test"] = _figures(trainer.evaluate(test_items, metric_key_prefix="test"), "test")
    return results


def _figures(found: dict[str, float], prefix: str) -> dict[str, float]:
    """Metrics and loss out of what the Trainer measured."""
    names = (*METRIC_NAMES.values(), TOP5, "loss")
    return {name: found[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in found}


def resolved_arguments(args: FinetuneArguments, training_args: FinetuneTrainingArguments) -> dict[str, Any]:
    """Our own arguments, and those of `TrainingArguments` that are not at the values it has by itself."""
    stock = TrainingArguments(output_dir=training_args.output_dir).to_dict()
    ours = {entry.name for entry in fields(FinetuneTrainingArguments) if entry.name in vars(FinetuneTrainingArguments)}
    given = {k: v for k, v in training_args.to_dict().items() if k in ours or v != stock[k]}
    return json.loads(json.dumps(vars(args) | given, default=str))


def write_outputs(
    out: Path, arguments: dict[str, Any], modality: str, task: Task, results: dict[str, Any], seconds: float
) -> None:
    """results.json, run.json and the model card."""
    note = f"epoch: {results['epoch']}"
    if results["views_per_item"] > 1:
        note += f"; {results['views_per_item']} views per item"
    measured = {
        "metric": results["metric"],
        "value": results["evaluation"][results["metric"]],
        "split": results["evaluated_on"],
        "note": note,
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
        "results": {f"{modality} classification": measured},
    }
    write_json(out / "results.json", results)
    write_json(out / "run.json", run)
    write_card(out, run)
    print(f"{measured['metric']} {measured['value']:.4f} on {measured['split']}; the classifier is in {out}")


if __name__ == "__main__":
    main()
