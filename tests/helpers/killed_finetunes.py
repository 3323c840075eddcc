"""Fine-tuning runs that are killed and resumed, in forks of this process.

Moments are as for killed_runs.py, without schedules. What each leaves in FOLDER/<number>/ is for the caller to compare
with FOLDER/undisturbed.
"""

from pathlib import Path

import torch
from helpers.killed_runs import run_child
from helpers.sounds import save_encoder, write_sounds

from bridle_hf.common.arguments import parse_command_line
from bridle_hf.finetuning import finetune
from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.finetuning.training_arguments import FinetuneTrainingArguments


OPTIONS = {
    "num_train_epochs": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "mixup_probability": 0.5,
    "drop_path_rate": 0.1, "eval_group": 1, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
    "eval_steps": 2, "save_total_limit": 1, "disable_tqdm": "true",
}  # fmt: skip


def run(model: str, data: str, out: Path, resume: bool = False, **options: object) -> None:
    """What the command does with these words, in this process; raises instead of exiting."""
    options |= {"resume": "true"} if resume else {}
    options = {"model": model, "data": data, "output_dir": out, **OPTIONS, **options}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    finetune.run_finetuning(*parse_command_line(FinetuneArguments, FinetuneTrainingArguments, argv=words))


def kill_and_resume(folder: Path, moments: list) -> None:
    """All of `moments`, one after the other."""
    torch.set_num_threads(1)
    model, data = save_encoder(folder / "encoder"), write_sounds(folder / "sounds")
    (folder / "sounds" / "noise_0.wav").write_bytes(b"broken")
    assert not run_child(run, (model, data, folder / "undisturbed"), None)
    for number, kills in enumerate(moments):
        arguments, ended = (model, data, folder / str(number)), False
        for kill in kills:
            killed = run_child(run, arguments, kill)
            assert killed or ended or isinstance(kill, float), f"{kill} never came"
            ended |= not killed  # before its time came: a run that is done calls nothing more
            arguments = (model, data, folder / str(number), True)
        assert not run_child(run, arguments, None)
