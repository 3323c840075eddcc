"""Pretrain an encoder and its tokenizer in turns, from a folder or Hub id of unlabelled data.

    accelerate launch training/pretrain.py training/recipes/audio_base.yaml --data DIR_OR_HUB_ID --output_dir OUT

Writes OUT/encoder and OUT/tokenizer (`from_pretrained` folders), metrics.jsonl, checkpoints/, figures/, report.html
and run.json. `--resume` goes on from the newest checkpoint.
"""

import contextlib
import logging
from collections.abc import Iterator

import transformers
from safetensors import SafetensorError

from bridle_hf.common.arguments import parse_arguments
from bridle_hf.common.errors import ArgumentError, NonFiniteError, TooManyBadFiles
from bridle_hf.common.signals import StopRequest
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.checkpointing import CheckpointError
from bridle_hf.pretraining.dry_run import dry_run
from bridle_hf.pretraining.processes import ending_with_the_others
from bridle_hf.pretraining.run import start


def main() -> None:
    (args,) = parse_arguments(PretrainArguments)
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with ending_with_the_others():
        if args.dry_run:
            with refusing():
                dry_run(args)
        else:
            with StopRequest() as stop:
                carry_out(args, stop)


def carry_out(args: PretrainArguments, stop: StopRequest) -> None:
    with refusing():
        run = start(args)
    try:
        if run.train(stop):
            run.finish()
    except (NonFiniteError, TooManyBadFiles, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error
    except (OSError, SafetensorError) as error:  # a full disk is either, by who writes
        raise SystemExit(f"error: {error}; mend this (output_dir is {run.out}), and --resume goes on") from error


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """One line for what goes wrong before the first step: it is about arguments and data."""
    try:
        yield
    except (ValueError, OSError, TooManyBadFiles, CheckpointError) as error:
        raise ArgumentError(str(error)) from error


if __name__ == "__main__":
    main()
