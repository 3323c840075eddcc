"""Pretraining of an encoder and its tokenizer in turns, from a folder or Hub id of unlabelled data.

    accelerate launch -m bridle_hf.pretraining audio_base --data DIR_OR_HUB_ID --output_dir OUT

Writes OUT/encoder and OUT/tokenizer (`from_pretrained` folders), metrics.jsonl, checkpoints/, figures/, report.html
and run.json. `--resume` goes on from the newest checkpoint.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from safetensors import SafetensorError

from bridle_hf.cards.publishing import push
from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.errors import ArgumentError, RunError, TooManyBadFiles
from bridle_hf.common.heap import keep_large_tensors_out_of_the_heap
from bridle_hf.common.signals import StopRequest
from bridle_hf.monitoring.metrics_log import read_metrics
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.checkpointing import CheckpointError
from bridle_hf.pretraining.dry_run import dry_run
from bridle_hf.pretraining.processes import ending_with_the_others
from bridle_hf.pretraining.run import start


@dataclass(frozen=True)
class PretrainResult:
    """What a run has made.

    Args:
        output_dir: all of it.
        encoder, tokenizer: `from_pretrained` folders in it.
        metrics: the last row of metrics.jsonl.
        finished: whether the last step has been done; a signal ends a run before, and `resume=True` goes on.
    """

    output_dir: Path
    encoder: Path
    tokenizer: Path
    metrics: dict[str, Any]
    finished: bool


def pretrain(recipe: str | None = None, **options: Any) -> PretrainResult | list[str]:
    """Pretrain an encoder and its tokenizer: `pretrain("audio_base", data=DIR, output_dir=OUT, seed=1)`.

    Args:
        recipe: name of a recipe of the package (`bridle recipes` lists them) or path of a YAML file.
        options: the fields of [`PretrainArguments`]; a mapping, as `encoder={"num_hidden_layers": 6}`, changes the
            recipe's entry by entry.

    Returns:
        What was made; of a dry run, which makes nothing, the lines that the command prints.

    Raises:
        ArgumentError: arguments, data or output folder are not fit to start; nothing has been trained yet. It is a
            `ValueError`.
        RunError: the run had begun and could not go on. It is a `RuntimeError`.
    """
    (args,) = make_arguments(PretrainArguments, recipe=recipe, values=options)
    with _leaving_no_state():
        return run_pretraining(args)


def run_pretraining(args: PretrainArguments) -> PretrainResult | list[str]:
    """[`pretrain`], with its arguments."""
    with ending_with_the_others():
        if args.dry_run:
            with refusing():
                return dry_run(args)
        with StopRequest() as stop:
            finished, repositories = carry_out(args, stop)
        if finished:
            push(Path(args.output_dir), repositories, args.license)
    out = Path(args.output_dir)
    rows = read_metrics(out / "metrics.jsonl")
    return PretrainResult(out, out / "encoder", out / "tokenizer", rows[-1] if rows else {}, finished)


def carry_out(args: PretrainArguments, stop: StopRequest) -> tuple[bool, dict[str, str]]:
    """The run, from its start to its end; returns whether it came to its last step, and the repositories to push to
    (on rank 0)."""
    keep_large_tensors_out_of_the_heap()
    with refusing():
        run = start(args)
    try:
        finished = run.train(stop)
        if finished:
            run.finish()
        return finished, run.repositories
    except (OSError, SafetensorError) as error:  # a full disk is either, by who writes
        raise RunError(f"{error}; mend this (output_dir is {run.out}), and --resume goes on") from error


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """One line for what goes wrong before the first step: it is about arguments and data."""
    try:
        yield
    except (ValueError, OSError, TooManyBadFiles, CheckpointError) as error:
        raise ArgumentError(str(error)) from error


@contextlib.contextmanager
def _leaving_no_state() -> Iterator[None]:
    """Let the next call choose its own precision and processes, unless the caller had an accelerator before."""
    had_none = not PartialState._shared_state
    try:
        yield
    finally:
        if had_none:
            AcceleratorState._reset_state(reset_partial_state=True)
