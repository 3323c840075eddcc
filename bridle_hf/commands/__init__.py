"""The command `bridle`: the table of all commands, and the one place that ends a process with a status.

A command's arguments are dataclasses that import nothing large, so that help and wrong arguments cost no time. What it
does is a function of `bridle_hf.commands.actions`, which calls what Python can call too.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import bridle_hf
from bridle_hf.commands.help import command_help, overview
from bridle_hf.common.arguments import parse_command_line
from bridle_hf.common.errors import ArgumentError, RunError, nearest


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        summary: one line.
        usage: what follows the command's name.
        arguments: dataclasses of its options, as "room.module:Class": those that its help lists.
        more_arguments: further ones, which its help names in `more`.
        positionals: options that are given without their names.
        fixed: options that it sets itself.
        loads_models: whether it needs torch and transformers.
        extra: of the package, that brings what it needs.
    """

    summary: str
    usage: str
    arguments: tuple[str, ...] = ()
    more_arguments: tuple[str, ...] = ()
    more: str = ""
    takes_recipe: bool = False
    positionals: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    loads_models: bool = True
    extra: str = "train"


COMMANDS = {
    "pretrain": Command(
        "pretrain an encoder and its tokenizer on unlabelled data",
        "RECIPE --data DIR_OR_HUB_ID --output_dir OUT [--name value ...]",
        ("pretraining.arguments:PretrainArguments",),
        takes_recipe=True,
    ),
    "finetune": Command(
        "fine-tune a pretrained encoder into a classifier",
        "[RECIPE] --model DIR_OR_HUB_ID --data DIR_OR_HUB_ID --output_dir OUT [--name value ...]",
        ("finetuning.arguments:FinetuneArguments",),
        ("finetuning.training_arguments:FinetuneTrainingArguments",),
        "Options of transformers.TrainingArguments, all taken too, as --learning_rate and --num_train_epochs:\n"
        "  https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments",
        takes_recipe=True,
    ),
    "probe": Command(
        "probe a frozen encoder on labelled data, beside its controls",
        "--model DIR_OR_HUB_ID --data DIR_OR_HUB_ID [--name value ...]",
        ("probing.arguments:ProbeArguments",),
    ),
    "embed": Command(
        "embed a folder of recordings, images or videos into a table; goes on where it was",
        "DIR_OR_HUB_ID --model DIR_OR_HUB_ID --output X.parquet|.npz|.npy [--name value ...]",
        ("embedding.arguments:EmbedArguments",),
        positionals=("data",),
    ),
    "search": Command(
        "find the nearest neighbours of a file in such a table",
        "X.parquet FILE [--top_k N]",
        ("embedding.arguments:SearchArguments",),
        positionals=("table", "file"),
    ),
    "prepare": Command(
        "write the metadata.csv of a data set as downloaded, or of list files",
        "LAYOUT DIR_OR_LIST [--output_dir OUT] [--overwrite]",
        ("data.layouts.arguments:PrepareArguments",),
        positionals=("layout", "data"),
    ),
    "shard": Command(
        "write shards (tar or parquet) of a folder or data set",
        "--data DIR_OR_HUB_ID --output_dir OUT [--name value ...]",
        ("data.shards.arguments:ShardArguments",),
    ),
    "card": Command(
        "write the model card of a saved folder",
        "FOLDER --run OUT/run.json [--repo_id ORG/NAME]",
        ("commands.arguments:CardArguments",),
        positionals=("folder",),
    ),
    "push": Command(
        "push the models of a finished run to the Hub, with their cards",
        "OUT [--hub_model_id ORG/NAME] [--license NAME] [--hub_private]",
        ("cards.arguments:PushArguments",),
        positionals=("output_dir",),
    ),
    "convert": Command(
        "convert a checkpoint of the BRIDLE authors' code, or of MAE, AudioMAE, ViT, DINOv2 or VideoMAE",
        "CHECKPOINT OUT [--modality audio|image|video] [--name value ...]",
        ("commands.arguments:ConvertArguments",),
        positionals=("checkpoint", "output_dir"),
    ),
    "export": Command(
        "export an encoder, classifier or tokenizer to ONNX or torch.export, and check it",
        "DIR_OR_HUB_ID X.onnx|.pt2 [--input waveform]",
        ("exporting.arguments:ExportArguments",),
        positionals=("model", "output"),
        extra="export",
    ),
    "flops": Command(
        "tell what a recipe costs: FLOPs and GPU hours",
        "RECIPE --samples N [--name value ...]",
        ("pretraining.arguments:FlopsArguments",),
        ("pretraining.arguments:PretrainArguments",),
        "Options of `bridle pretrain`, all of which are taken too, but for --data and --output_dir.",
        takes_recipe=True,
        fixed={"data": "-", "output_dir": "-"},
    ),
    "report": Command(
        "write the report of a run anew",
        "OUT",
        ("commands.arguments:ReportArguments",),
        positionals=("output_dir",),
    ),
    "demo": Command(
        "pretrain, probe and fine-tune on small real data, in minutes; or show models in a browser",
        "--output_dir OUT [--modality M] [--name value ...] | --serve DIR [--embeddings X.parquet]",
        ("demos.arguments:DemoArguments",),
    ),
    "study": Command(
        "pretrain and probe a grid of arms, sets and seeds; tables and figures of it",
        "GRID --output_dir DIR [--workers N] [--report]",
        ("study.arguments:StudyArguments",),
        positionals=("grid",),
    ),
    "recipes": Command("list the recipes of the package", "", loads_models=False),
    "info": Command("show versions, devices and what is installed, for bug reports", ""),
}


def main(name: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a command; ends the process with one line and status 2 if arguments or data are wrong, 1 if a run fails,
    130 at Ctrl-C, where that does not end a run in good order.

    Args:
        name: the command; the first word of `argv` if not given.
        argv: words of the command line; those of this process if not given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        run(name, words)
    except ArgumentError as error:
        _end(error, 2)
    except RunError as error:
        _end(error, 1)
    except KeyboardInterrupt:
        _end("interrupted", 130)


def run(name: str | None, words: list[str]) -> None:
    """[`main`], but that errors are raised."""
    if name is None:
        if not words or words[0] in ("-h", "--help"):
            print(overview(COMMANDS))
            return
        name = words.pop(0)
    if name == "--version":
        print(f"bridle_hf {bridle_hf.__version__}")
        return
    if name not in COMMANDS:
        raise ArgumentError(f"no command '{name}'{nearest(name, COMMANDS)} (`bridle --help` lists them)")
    if "-h" in words or "--help" in words:
        print(command_help(name, COMMANDS[name], [_find(path) for path in COMMANDS[name].arguments]))
        return
    arguments = read_arguments(COMMANDS[name], words)
    if COMMANDS[name].loads_models:
        bridle_hf.load()
    act = getattr(importlib.import_module("bridle_hf.commands.actions"), name)
    try:
        act(*arguments)
    except ModuleNotFoundError as error:
        if (error.name or "bridle_hf").startswith("bridle_hf"):
            raise
        raise RunError(
            f"`bridle {name}` needs {error.name}, which is not installed: "
            f"pip install 'bridle_hf[{COMMANDS[name].extra}]'"
        ) from error


def read_arguments(command: Command, words: list[str]) -> tuple[Any, ...]:
    """The command's arguments, as instances of its dataclasses.

    Raises:
        ArgumentError: see [`parse_command_line`].
    """
    for place, name in enumerate(command.positionals):
        if len(words) <= 2 * place or words[2 * place].startswith("-"):
            break
        words[2 * place : 2 * place] = [f"--{name}"]
    types = [_find(path) for path in (*command.arguments, *command.more_arguments)]
    fixed = [word for name, value in command.fixed.items() for word in (f"--{name}", value)]
    if not types:
        if words:
            raise ArgumentError(f"'{words[0]}' is one word too many")
        return ()
    return parse_command_line(*types, argv=[*words, *fixed], takes_recipe=command.takes_recipe)


def _find(path: str) -> type:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"bridle_hf.{module}"), name)


def _end(error: Exception | str, status: int) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(status)
