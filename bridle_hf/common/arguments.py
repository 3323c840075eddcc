"""Arguments of the training scripts: a YAML recipe first, then `--name value` overrides.

    pretrain.py training/recipes/audio_demo.yaml --data DIR --output_dir OUT --encoder.hidden_size 256

Every error about an argument is one line that names the field.
"""

import difflib
import json
import math
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: `1e-3` is a number and `no` a word, unlike in PyYAML's 1.1."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_FLOAT = r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(text: str) -> Any:
    """What a recipe or an option holds.

    Raises:
        ValueError: It is not YAML.
    """
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"not YAML: {error}") from error


class ArgumentError(SystemExit):
    """A wrong argument: one line that names the field, and exit status 2."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message = " ".join(message.split())
        print(f"error: {message}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return self.message


class Mapping(dict):
    """A mapping as YAML text: `{hidden_size: 128}`; on the command line key by key: `--encoder.hidden_size 8`."""

    def __init__(self, text: str):
        value = _load_value(text)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ArgumentTypeError(f"expected a mapping of names to values, got {text!r}")
        super().__init__(value)


class Sequence(tuple):
    """A sequence of mappings given as YAML text: `[{train: encoder, steps: 600}]`."""

    def __new__(cls, text: str):
        value = _load_value(text)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise ArgumentTypeError(f"expected a list of mappings, got {text!r}")
        return super().__new__(cls, value)


def _load_value(text: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError as error:
        # The one exception whose text argparse shows.
        raise ArgumentTypeError(str(error)) from error


@dataclass
class PretrainArguments:
    """Arguments of `training/pretrain.py`."""

    data: str = field(metadata={"help": "folder, shards or Hub id of the recordings, images or clips"})
    output_dir: str = field(metadata={"help": "folder to write; must not exist without --resume or --overwrite"})
    modality: Literal["audio", "image", "video"] = field(default="audio", metadata={"help": "what the data is"})

    split: str | None = field(default=None, metadata={"help": "use this split of the data alone"})
    label_column: str = field(default="label", metadata={"help": "column of the labels (for probes alone)"})
    group_column: str = field(default="group", metadata={"help": "column of the groups"})
    exclude_groups: list[str] = field(default_factory=list, metadata={"help": "groups kept out of pretraining"})
    augment: bool = field(default=False, metadata={"help": "audio: shift and gain; image, video: crops, flip"})
    cache_mb: int = field(default=0, metadata={"help": "memory per process for decoded inputs, MiB"})

    encoder: Mapping = field(default_factory=dict, metadata={"help": "fields of BridleConfig"})
    tokenizer: Mapping = field(default_factory=dict, metadata={"help": "fields of BridleTokenizerConfig"})
    processor: Mapping = field(default_factory=dict, metadata={"help": "fields of the modality's processor"})
    loader: Mapping = field(
        default_factory=dict, metadata={"help": "fields of the modality's loader: {flip: false}, {stride: 4}"}
    )
    measure_normalization: bool = field(
        default=False, metadata={"help": "audio: measure mean and std of the log-mel on the data"}
    )
    masks: Mapping = field(
        default_factory=dict, metadata={"help": "weights of the masks drawn from, as {random: 1, mel_band: 3}"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more time"})

    phases: Sequence = field(default=(), metadata={"help": "the schedule: see interleaving.Phase"})
    steps_scale: float = field(default=1.0, metadata={"help": "factor on the length of every phase"})
    global_batch_size: int = field(default=64, metadata={"help": "samples per optimizer step, over all processes"})
    micro_batch_size: int | None = field(
        default=None, metadata={"help": "samples that one process holds at a time; gradients are accumulated"}
    )
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"help": "of AdamW"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of AdamW, on matrices alone"})
    max_grad_norm: float | None = field(default=None, metadata={"help": "clip the gradient norm of each side"})
    mixed_precision: Literal["no", "bf16", "fp16"] = field(default="no", metadata={"help": "autocast"})
    deterministic: bool = field(default=False, metadata={"help": "deterministic algorithms, at a price in speed"})
    seed: int = field(default=0, metadata={"help": "of everything that is random"})
    num_workers: int = field(default=0, metadata={"help": "loader processes per training process"})

    log_every: int = field(default=20, metadata={"help": "steps between lines of metrics.jsonl"})
    save_every: int = field(
        default=1000, metadata={"help": "steps between checkpoints; 0: at the end of phases alone"}
    )
    keep_last: int = field(default=2, metadata={"help": "newest checkpoints kept"})
    keep_every: int = field(default=0, metadata={"help": "steps between checkpoints that are kept for good; 0: none"})
    keep_iterations: bool = field(default=False, metadata={"help": "keep the models of every phase in OUT/iterations"})
    report_every: int = field(default=200, metadata={"help": "steps between rewrites of report.html; 0: at the end"})
    probe_every: int = field(default=0, metadata={"help": "steps between probes, if there are labels; 0: none"})
    probe_items: int = field(default=2000, metadata={"help": "items that a probe uses at most"})
    tracker: Literal["none", "tensorboard", "trackio"] = field(
        default="tensorboard", metadata={"help": "beside metrics.jsonl"}
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "TFLOP/s that one process could do at most, for the MFU; default: measured"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint of output_dir"})
    overwrite: bool = field(default=False, metadata={"help": "delete what output_dir holds"})
    dry_run: bool = field(
        default=False, metadata={"help": "do a step of each phase, tell what the run would take, and write nothing"}
    )
    overfit_one_batch: bool = field(
        default=False, metadata={"help": "see the first batch at every step: a check that the loss can fall"}
    )

    def __post_init__(self):
        ranges = {
            "steps_scale": (1e-9, 1e9), "global_batch_size": (1, 1e9), "micro_batch_size": (1, 1e9),
            "weight_decay": (0, 1e9), "max_grad_norm": (1e-9, math.inf), "seed": (0, 2**32 - 1),
            "num_workers": (0, 1e4), "cache_mb": (0, 1e9), "log_every": (1, 1e9), "save_every": (0, 1e9),
            "keep_last": (1, 1e9), "keep_every": (0, 1e9), "report_every": (0, 1e9), "probe_every": (0, 1e9),
            "probe_items": (1, 1e9), "peak_tflops": (1e-9, 1e9),
        }  # fmt: skip
        check_ranges(self, ranges)
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"--adam_betas is {self.adam_betas}: expected two numbers in [0, 1)")
        if self.measure_normalization and self.modality != "audio":
            raise ValueError("--measure_normalization is for audio: give processor.image_mean and image_std instead")


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

    def __post_init__(self):
        ranges = {
            "validation_fraction": (0, 0.99), "max_length": (1, 1e9), "std": (1e-9, 1e9), "mixup_alpha": (1e-9, 1e9),
            "draws_per_epoch": (1, 1e9), "cache_mb": (0, 1e9),
        }  # fmt: skip
        check_ranges(self, ranges)
        if len(self.patch_dropout) != 2:
            raise ValueError(f"--patch_dropout is {self.patch_dropout}: expected two numbers, for time and mel")


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
    metric_for_best_model: str | None = field(
        default="auto", metadata={"help": "what the best epoch is chosen by; auto: the accuracy or mAP"}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of AdamW, on matrices alone"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "of the single-label cross-entropy"})
    seed: int = field(default=0, metadata={"help": "of everything that is random"})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "faster copies to a GPU"})
    # Without it, several processes on CPUs would not know of each other, and bf16 would be refused.
    use_cpu: bool = field(default=not torch.accelerator.is_available(), metadata={"help": "no GPU"})
    # The batches hold what the model takes, and `skipped` for the trainer.
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay false"})

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("the following arguments are required: --output_dir")
        super().__post_init__()


class _OneLineParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message.removeprefix("argument "))


def parse_arguments(*dataclass_types: type, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Instances of `dataclass_types` from `[RECIPE.yaml] [--name value ...]`; later values win.

    Raises:
        ArgumentError: An unknown name (with the nearest valid one), a missing or a wrong value; it ends the process
            with status 2 and one line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _OneLineParser(dataclass_types, allow_abbrev=False)
    names = [entry.name for dataclass_type in dataclass_types for entry in fields(dataclass_type)]
    values: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        recipe = argv.pop(0)
        values = _read_recipe(recipe)
        for name in values:
            if name not in names:
                raise ArgumentError(f"{recipe}: unknown key '{name}'{_nearest(name, names)}")
    options = _as_options(values) + _without_dotted(argv, values, names)
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            options, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        # From a dataclass that checks its fields.
        raise ArgumentError(str(error)) from error
    if unknown and unknown[0].startswith("--"):
        name = unknown[0].removeprefix("--").split("=")[0].split(".")[0]
        raise ArgumentError(f"unknown argument '{unknown[0]}'{_nearest(name, names)}")
    if unknown:
        before = [option for option in options[: options.index(unknown[0])] if option.startswith("--")]
        raise ArgumentError(f"{before[-1] if before else 'arguments'}: '{unknown[0]}' is one value too many")
    return tuple(instances)


def _read_recipe(path: str) -> dict[str, Any]:
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"recipe {path}: {error.strerror}") from error
    except ValueError as error:
        raise ArgumentError(f"recipe {path}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ArgumentError(f"recipe {path}: expected a mapping of names to values")
    return values


def _as_options(values: dict[str, Any]) -> list[str]:
    """A recipe as command-line options, so that both go through one parser."""
    options = []
    for name, value in values.items():
        if value is None:
            continue
        options.append(f"--{name}")
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(entry, dict) for entry in value)):
            # JSON, because it reads as YAML of any version.
            options.append(json.dumps(value, default=str))
        elif isinstance(value, list):
            options.extend(map(str, value))
        else:
            options.append(str(value))
    return options


def _without_dotted(argv: list[str], recipe: dict[str, Any], names: list[str]) -> list[str]:
    """Take `--encoder.hidden_size 256` and `--phases.0.steps 10` out of `argv`, on top of the recipe's value."""
    rest, structures = [], {}
    position = 0
    while position < len(argv):
        option, equals, value = argv[position].partition("=")
        name, *path = option.removeprefix("--").split(".")
        position += 1
        if not option.startswith("--") or not path or name not in names:
            rest.append(argv[position - 1])
            continue
        if not equals:
            if position == len(argv) or argv[position].startswith("--"):
                raise ArgumentError(f"{option}: expected a value")
            value = argv[position]
            position += 1
        try:
            _set(structures.setdefault(name, recipe.get(name) or {}), path, read_yaml(value))
        except ValueError as error:
            raise ArgumentError(f"{option}: {error}") from error
    for name in structures:
        if any(argument.split("=")[0] == f"--{name}" for argument in rest):
            raise ArgumentError(f"--{name} is given as a whole and in parts: choose one")
    return _as_options(structures) + rest


def _set(structure: Any, path: list[str], value: Any) -> None:
    try:
        for part in path[:-1]:
            structure = structure[int(part)] if isinstance(structure, list) else structure[part]
        structure[int(path[-1]) if isinstance(structure, list) else path[-1]] = value
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError("the recipe has no such entry") from error


def check_ranges(args: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise a `ValueError` unless each of these fields is unset or from the least to the most."""
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name} is {value}: expected {least:g} to {most:g}")


def check_name(where: str, name: str, known: Iterable[str]) -> None:
    """Raise a `ValueError` unless `name` is one of `known`."""
    if name not in known:
        raise ValueError(f"{where}.{name} is not a field{_nearest(name, list(known))}")


def _nearest(name: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
