"""Processes of a run: how they start, how they wait for each other, and how they end together."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env, set_seed

from bridle_hf.common.errors import RunError
from bridle_hf.monitoring.trackers import check_tracker
from bridle_hf.pretraining.arguments import PretrainArguments


# How long a process waits for the others in a step. One that died ends the run at once, through its launcher; this is
# for one that hangs.
STEP_TIMEOUT = timedelta(minutes=10)
# How long the others wait while rank 0 evaluates, probes or writes.
RANK_0_TIMEOUT = timedelta(days=1)


def make_accelerator(args: PretrainArguments) -> Accelerator:
    check_tracker(args.tracker)
    if args.deterministic:
        # Without it, cuBLAS refuses to work under deterministic algorithms; it reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    on_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    accelerator = Accelerator(
        cpu=not on_accelerator,
        mixed_precision=args.mixed_precision,
        log_with=None if args.tracker == "none" else args.tracker,
        project_dir=args.output_dir,
        kwargs_handlers=[
            # The codebooks are kept equal by the quantizer; nothing else is a buffer that changes.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=STEP_TIMEOUT),
        ],
    )
    set_seed(args.seed, deterministic=args.deterministic)
    return accelerator


def asked_to_shard() -> bool:
    """Whether the launcher's config asks for FSDP2.

    Raises:
        ValueError: it asks for the first FSDP.
    """
    asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("the accelerate config asks for FSDP 1: set fsdp_version: 2 in its fsdp_config")
    return asked


class Rank0:
    """Stages that rank 0 alone does (evaluation, probes, saves) while the others wait, however long it takes."""

    def __init__(self, accelerator: Accelerator):
        several = accelerator.num_processes > 1
        # A group of its own: the timeout of a step is too short for it.
        self._group = torch.distributed.new_group(backend="gloo", timeout=RANK_0_TIMEOUT) if several else None

    def wait(self) -> None:
        """All processes meet here."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)


@contextlib.contextmanager
def ending_with_the_others() -> Iterator[None]:
    """One line where a process cannot go on because another has ended: what happened is in that one's message."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors are of no class of their own.
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise RunError(f"another process of the run has ended or hangs, see its message: {reason}") from error
