"""Resuming of a run: its newest checkpoint, and what must be as it was."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from bridle_hf.common.output_folder import changed
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.checkpointing import load_newest
from bridle_hf.pretraining.processes import Rank0


logger = logging.getLogger(__name__)

# What may differ between a run and its continuation.
FREE_ON_RESUME = {
    "resume", "overwrite", "num_workers", "cache_mb", "log_every", "save_every", "keep_last", "keep_every",
    "report_every", "probe_every", "probe_samples", "tracker", "keep_iterations", "output_dir", "micro_batch_size",
    "bucket_by_length", "data", "data_streaming", "media_column", "layout", "peak_tflops", "dry_run",
    "allow_changed_data", "loader_timeout", "code_cache", "push_to_hub", "hub_model_id", "hub_private", "license",
}  # fmt: skip


def load_newest_of_all(out: Path, rank_0: Rank0) -> dict[str, Any] | None:
    """State of the newest checkpoint, the same in all processes; `None` if there is none.

    Raises:
        ValueError: the processes find different ones.
        CheckpointError: there are checkpoints, and all are broken.
    """
    state = load_newest(out / "checkpoints")
    rank_0.wait()  # however long it takes
    steps = gather_object([None if state is None else state["step"]])
    if len(set(steps)) > 1:
        raise ValueError(
            f"--resume: the processes find different checkpoints in {out} (of steps {steps}): "
            "it must lie on a file system that all machines share"
        )
    return state


def check_unchanged(
    args: PretrainArguments, out: Path, data: dict[str, Any], state: dict[str, Any]
) -> tuple[int, list[dict[str, Any]]]:
    """See that the run goes on as it began; note what data it has lost or got, if it may.

    Args:
        data: what its samples are: `samples`, how many, and `names_of_samples`, their hash.
        state: of the checkpoint.

    Returns:
        How many samples the schedule was made for, and all changes of the data so far.

    Raises:
        ValueError: arguments differ, or data do and need not be as they were only by `allow_changed_data`.
    """
    # An option that is newer than the run was as it is by default.
    known = plain(PretrainArguments(data="-", output_dir="-"))
    differing = changed(plain(args), known | state["arguments"], FREE_ON_RESUME)
    before = {name: state.get(name, value) for name, value in data.items()}
    if data != before and not args.allow_changed_data:
        if data["samples"] != before["samples"]:
            differing.append(f"the number of samples ({before['samples']}, now {data['samples']})")
        else:
            differing.append("the names of the samples")
    if differing:
        raise ValueError(f"--resume: not as in the run in {out}: {', '.join(differing)}; give the same values, or, "
                         "where files alone have changed, --allow_changed_data true")  # fmt: skip
    changes = state.get("data_changes", [])
    if data != before:
        change = {"step": state["step"], "samples_before": before["samples"], "samples": data["samples"]}
        changes = [*changes, change]
        logger.warning("--allow_changed_data: %s: from step %d on, the run draws from another list of files (%d, "
                       "before %d): it is not the run that it would have been; run.json says so",
                       args.data, state["step"], data["samples"], before["samples"])  # fmt: skip
    return state.get("scheduled_samples", before["samples"]), changes


def plain(args: PretrainArguments) -> dict[str, Any]:
    """Arguments as JSON would give them back."""
    return json.loads(json.dumps(vars(args)))
