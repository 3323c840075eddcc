"""Resume of a fine-tuning run: its folder, the checkpoint to go on from, arguments and data as they were."""

from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock

from bridle_hf.common.files import read_json, write_json
from bridle_hf.common.output_folder import FINETUNING, changed, prepare
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.finetuning.checkpoints import newest_whole
from bridle_hf.finetuning.training_arguments import FinetuneTrainingArguments


# What may differ between a run and its continuation; the global batch must not.
FREE_ON_RESUME = {
    "resume", "overwrite", "output_dir", "data", "data_streaming", "media_column", "layout",
    "cache_mb", "loader_timeout", "dataloader_num_workers",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory", "disable_tqdm",
    "logging_strategy", "logging_steps", "logging_first_step", "logging_dir", "log_level", "log_level_replica",
    "log_on_each_node", "report_to", "run_name", "project", "save_strategy", "save_steps", "save_total_limit",
    "use_cpu", "ddp_backend", "ddp_timeout", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "push_to_hub", "hub_model_id", "hub_private", "license",
}  # fmt: skip


def prepare_folder(
    out: Path, args: FinetuneArguments, training_args: FinetuneTrainingArguments, run: dict[str, Any]
) -> tuple[FileLock | None, str | None]:
    """Make the folder ready, and send the Trainer's checkpoints to OUT/checkpoints; all processes call it.

    Returns:
        The folder's lock, on rank 0, and the checkpoint to go on from, if there is one.

    Raises:
        ValueError: see `output_folder.prepare`; or what is resumed is not the run that `run` describes.
        CheckpointError: every checkpoint is broken.
    """
    checkpoints = out / "checkpoints"
    training_args.output_dir = str(checkpoints)
    lock, checkpoint = None, None
    if training_args.process_index == 0:
        inputs = {"data": args.data, "model": args.model, "label_order": args.label_order}
        lock = prepare(out, FINETUNING, inputs, args.resume, args.overwrite)
        if args.resume:
            checkpoint = newest_whole(checkpoints, training_args.load_best_model_at_end)
        ledger = SkippedFiles(out / "skipped.jsonl", run["samples"], shared=True)
        if checkpoint is None:
            ledger.output_path.unlink(missing_ok=True)  # files may have been mended since
        else:
            check_unchanged(out, run)
            ledger.load_state_dict(ledger.state_dict())  # without a line that a kill has cut short
        write_json(out / "run.json", run)
        checkpoints.mkdir(exist_ok=True)
    found = broadcast_object_list([None if checkpoint is None else str(checkpoint)])
    return lock, found[0]


def check_unchanged(out: Path, run: dict[str, Any]) -> None:
    """See that a run goes on as it began.

    Raises:
        ValueError: arguments or data are not those of the run in `out`: names what has changed.
    """
    before = read_json(out / "run.json")
    if before is None:
        raise ValueError(f"--resume: {out} has checkpoints, but no run.json that says what they are of")
    differing = changed(run["arguments"], before["arguments"], FREE_ON_RESUME)
    differing += changed(*({"global batch size": entry["global_batch_size"]} for entry in (run, before)))
    for name, value in run["task"].items():
        theirs = before["task"].get(name)
        if value != theirs:
            differing.append(f"the {name} ({theirs}, now {value})" if isinstance(value, int) else f"the {name}")
    if differing:
        raise ValueError(f"--resume: not as in the run in {out}: {', '.join(differing)}; give the same values")


def global_batch_size(training_args: FinetuneTrainingArguments) -> int:
    """Draws of an optimizer step, over all processes."""
    per_process = training_args.train_batch_size * training_args.gradient_accumulation_steps
    return per_process * training_args.world_size
