"""Checkpoints of a run: written to a temporary folder, synced, renamed; verified on load; the oldest removed last.

OUT/checkpoints/
    step_1000/
        encoder.safetensors  tokenizer.safetensors    weights and codebooks
        average.safetensors                           the encoder's moving average, where there is one
        optimizers.pt                                 loaded with weights_only=True
        state.json                                    step, counters, ledger of skipped files
        manifest.json                                 sha256 of each file above
    step_2000/ ...
"""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bridle_hf.common.manifest import CheckpointError, check_manifest, sync, unreadable, write_manifest


logger = logging.getLogger(__name__)

# Parts of a state that are tensors by name, a file each.
MODELS = ("encoder", "tokenizer", "average")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep_last: int, keep_every: int = 0) -> Path:
    """Write `folder/step_N` so that it is there whole or not at all, then remove those no longer to be kept.

    Args:
        state: those of `MODELS` that there are (tensors by name), `optimizers` (optimizer states by name); all else
            must be JSON-serialisable.
        keep_last: how many of the newest stay.
        keep_every: those whose step is a multiple of it stay for good; 0: none.

    Raises:
        CheckpointError: the file system refused; checkpoints written before are untouched.
    """
    target, temporary = folder / f"step_{step}", folder / f".step_{step}.tmp"
    try:
        # What a run that was killed while it wrote has left.
        for leftover in folder.glob(".step_*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        for name in filter(state.__contains__, MODELS):
            tensors = {key: tensor.contiguous() for key, tensor in state[name].items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        torch.save(state["optimizers"], temporary / "optimizers.pt")
        rest = {key: value for key, value in state.items() if key not in (*MODELS, "optimizers")}
        (temporary / "state.json").write_text(json.dumps({"step": step, **rest}, indent=1), encoding="utf-8")
        write_manifest(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of the three, by who writes
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {target}: {error}; the one before is intact") from error
    # Newer ones, which were passed over as broken when the run was resumed, do not count.
    written = [path for path in list_checkpoints(folder) if _step_of(path) <= step]
    for old in written[:-keep_last]:
        if not keep_every or _step_of(old) % keep_every:
            _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    try:
        shutil.rmtree(checkpoint)
    except OSError as error:
        # What is too much is no reason to end a run, as where another process has a file of it open over NFS.
        logger.warning("cannot remove the old checkpoint %s: %s", checkpoint, error)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def load_newest(folder: Path) -> dict[str, Any] | None:
    """State of the newest checkpoint that is whole, on the CPU, or `None` if there is none at all.

    A broken one is passed over with a warning that names the file.

    Raises:
        CheckpointError: there are checkpoints, and all are broken.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; going back to the one before", error)
    if checkpoints:
        raise CheckpointError(f"every checkpoint in {folder} is broken; start anew with --overwrite")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """State that `save_checkpoint` wrote.

    Raises:
        CheckpointError: a file is missing, or not what was written.
    """
    check_manifest(path)
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        # Whether all are there that were written, the manifest has said.
        state |= {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        state["optimizers"] = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
        raise unreadable(path, error) from error
    return state
