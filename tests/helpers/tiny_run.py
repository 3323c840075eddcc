"""A pretraining run of seconds: recordings of many lengths, a recipe for a model of a few thousand weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from accelerate.state import AcceleratorState
from helpers.waiting import DEADLINE
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
RATE = 16000
RECIPE = {
    "encoder": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
        "num_mel_bins": 32,
        "max_length": 48,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "num_codebooks": 2,
        "codebook_size": 8,
    },
    "tokenizer": {
        "code_dim": 4,
        "estimator_hidden_size": 16,
        "estimator_num_hidden_layers": 1,
        "estimator_num_attention_heads": 2,
    },
    "masks": {"random": 1.0, "mel_band": 1.0},
    "measure_normalization": True,
    "augment": True,
    "global_batch_size": 8,
    "log_every": 2,
    "save_every": 4,
    "report_every": 0,
    "tracker": "none",
}
PHASES = {
    "phases": [
        {"train": "encoder", "steps": 6, "warmup_steps": 2, "learning_rate": 1e-3},
        {"train": "tokenizer", "steps": 6, "learning_rate": 1e-3},
        {"train": "encoder", "steps": 6, "learning_rate": 1e-3},
    ],
    "alternate": [{"train": "alternate", "steps": 12, "switch_every": 3, "learning_rate": 1e-3}],
    "joint": [{"train": "joint", "steps": 12, "tokenizer_every": 2, "learning_rate": 1e-3}],
}
# Several masks of a sample, of which a cross decoder decodes a share.
VIEWS = {"masks_per_sample": 4, "encoder": {"decoder_type": "cross", "decoded_ratio": 0.5}}
# Encoder phases that evidence ends after two windows: 6 of their 10 steps; codes are kept,
# patches of the tokenizer dropped.
SHORTCUTS = {
    "augment": False,
    "code_cache": True,
    "tokenizer_patch_dropout": 0.5,
    "phases": [
        {"train": "encoder", "steps": 10, "learning_rate": 1e-3, "until": {"accuracy_gain": 0.9, "over": 3}},
        {"train": "tokenizer", "steps": 6, "learning_rate": 1e-3},
        {"train": "encoder", "steps": 10, "learning_rate": 1e-3, "until": {"accuracy_gain": 0.9, "over": 3}},
    ],
}


def write_recordings(folder: Path, count: int = 24, labels: bool = False) -> str:
    """`folder` with `count` recordings of 0.1 to 0.6 s, so that most are padded and some are cropped."""
    rng = np.random.default_rng(0)
    for number in range(count):
        samples = int(rng.uniform(0.1, 0.6) * RATE)
        kind = ("noise", "tone")[number % 2]
        tone = np.sin(2 * np.pi * rng.uniform(300, 3000) * np.arange(samples) / RATE)
        path = folder / (kind if labels else "") / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.3 * (tone if kind == "tone" else rng.normal(size=samples)), RATE)
    return str(folder)


def write_recipe(path: Path, schedule: str = "phases", **changes) -> str:
    """`RECIPE` with one of `PHASES` as a file; a dict changes fields within its section."""
    recipe = {**RECIPE, "phases": PHASES[schedule]}
    for name, value in changes.items():
        recipe[name] = {**recipe[name], **value} if isinstance(recipe.get(name), dict) else value
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(path)


def pretrain(recipe: str, data: str, out: Path, *options: str) -> Any:
    """What the command does with these words, in this process; raises instead of exiting."""
    from bridle_hf.common.arguments import parse_command_line
    from bridle_hf.pretraining.arguments import PretrainArguments
    from bridle_hf.pretraining.pretrain import run_pretraining

    (args,) = parse_command_line(PretrainArguments, argv=[recipe, "--data", data, "--output_dir", str(out), *options])
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return run_pretraining(args)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def run_script(code: str, *argv: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a process of its own, or, over gloo, in several."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = Path(argv[-1])
    path.write_text(code, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment}
    return subprocess.run(
        [*launcher, str(path), *argv[:-1]], capture_output=True, text=True, timeout=DEADLINE, env=kept, cwd=ROOT
    )


def weights(out: Path) -> dict:
    """All tensors of both models of a finished run, codebooks included."""
    return {
        f"{name}.{key}": tensor
        for name in ("encoder", "tokenizer")
        for key, tensor in load_file(out / name / "model.safetensors").items()
    }


def rows(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock, the memory, and on what was cached before a kill."""
    clocks = {"codes/cached", "time", "cpu_seconds", "samples_per_second", "data_wait_share", "flops_per_second",
              "mfu", "memory_gib"}  # fmt: skip
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in clocks} for line in lines]
