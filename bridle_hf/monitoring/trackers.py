"""Experiment trackers: TensorBoard, trackio and others, by the accelerator."""

from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers


def start_tracker(accelerator: Any, out: Path, first_step: int | None) -> None:
    """Start the accelerator's tracker, if it has one; no step is shown twice.

    TensorBoard writes to OUT/tracker, and drops there what lies behind the step resumed from. trackio writes to a
    folder of its own on this machine (`trackio show --project bridle_hf`); what it has, it keeps, so that a resumed
    run is a run of its own in the group of the first.

    Args:
        first_step: Steps done before, where the run is resumed.
    """
    group, resumed = out.resolve().name, "" if first_step is None else f", from step {first_step}"
    trackio = {"name": group + resumed, "group": group, "embed": False, "auto_log_cpu": False}
    tensorboard = {} if first_step is None else {"purge_step": first_step + 1}
    is_trackio = "trackio" in map(str, accelerator.log_with)
    accelerator.init_trackers(
        "bridle_hf" if is_trackio else "tracker", init_kwargs={"trackio": trackio, "tensorboard": tensorboard}
    )


def check_tracker(name: str) -> None:
    """Raise a `ValueError` if the package of tracker `name` is not installed."""
    if name != "none" and name not in map(str, get_available_trackers()):
        raise ValueError(f"--tracker {name}: the package is not installed; pip install {name}, or --tracker none")
