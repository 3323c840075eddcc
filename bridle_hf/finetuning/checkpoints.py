"""Checkpoints of fine-tuning: the Trainer's folders, whole by their manifest; the oldest are removed last.

OUT/checkpoints/checkpoint-N/ is what `transformers.Trainer` saves after step N, and manifest.json, written last: a
folder without it is what a kill or a full disk has left, and does not count.
"""

import json
import logging
import shutil
from pathlib import Path

from bridle_hf.common.manifest import MANIFEST, CheckpointError, check_manifest


logger = logging.getLogger(__name__)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted((path for path in found if (path / MANIFEST).exists()), key=step_of)


def newest_whole(folder: Path, with_best: bool) -> Path | None:
    """The newest checkpoint that can be gone on from, or `None` if none has been finished.

    A broken one is passed over with a warning that names the file.

    Args:
        with_best: the best checkpoint up to then must be whole, too.

    Raises:
        CheckpointError: there are checkpoints, and all are broken.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            check_manifest(path)
            best = json.loads((path / "trainer_state.json").read_text(encoding="utf-8")).get("best_global_step")
            if with_best and best and best != step_of(path):
                check_manifest(path_of(folder, best))
        except CheckpointError as error:
            logger.warning("%s; going back to the one before", error)
        else:
            return path
    if checkpoints:
        raise CheckpointError(f"every checkpoint in {folder} is broken; start anew with --overwrite")
    return None


def remove_old(folder: Path, step: int, best_step: int | None, keep_last: int | None) -> None:
    """Remove all checkpoints up to `step` but the newest `keep_last` and the best."""
    # Newer ones, which were passed over as broken when the run was resumed, do not count.
    written = [path for path in list_checkpoints(folder) if step_of(path) <= step]
    for path in written[:-keep_last] if keep_last else ():
        if step_of(path) != best_step:
            shutil.rmtree(path, ignore_errors=True)
