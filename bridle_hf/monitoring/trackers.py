"""Experiment trackers: TensorBoard, wandb, MLflow and every other that accelerate knows by name."""

from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from bridle_hf.common.errors import nearest


PROJECT = "bridle_hf"
KNOWN = ("none", *(str(kind) for kind in LoggerType if kind is not LoggerType.ALL))
# What a tracker calls the name of a run; the others name it after the project alone.
RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name",
             "clearml": "task_name", "aim": "experiment"}  # fmt: skip


def start_tracker(accelerator: Any, out: Path, first_step: int | None) -> None:
    """Start the accelerator's tracker, if it has one; no step is shown twice.

    TensorBoard writes to OUT/tracker, and drops there what lies behind the step resumed from. The others write where
    they are set up to (`trackio show --project bridle_hf`), aim and dvclive to OUT; what they have, they keep, so that
    a resumed run is a run of its own, named after its folder and the step.

    Args:
        first_step: steps done before, where the run is resumed.
    """
    group, resumed = out.resolve().name, "" if first_step is None else f", from step {first_step}"
    options = {tracker: {name: group + resumed} for tracker, name in RUN_NAMES.items()}
    options["tensorboard"] = {} if first_step is None else {"purge_step": first_step + 1}
    options["trackio"] |= {"group": group, "embed": False, "auto_log_cpu": False}
    options["wandb"] |= {"group": group}
    options["dvclive"] = {"dir": str(out / "dvclive"), "save_dvc_exp": False}
    is_tensorboard = "tensorboard" in map(str, accelerator.log_with)
    accelerator.init_trackers("tracker" if is_tensorboard else PROJECT, init_kwargs=options)


def check_tracker(name: str) -> None:
    """Raise a `ValueError` if tracker `name` is not known, or its package is not installed."""
    if name not in KNOWN:
        raise ValueError(f"--tracker {name}: expected one of {', '.join(KNOWN)}{nearest(name, KNOWN)}")
    if name != "none" and name not in map(str, get_available_trackers()):
        raise ValueError(f"--tracker {name}: the package is not installed; pip install {name}, or --tracker none")
