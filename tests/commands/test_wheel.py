"""The wheel, installed where there is no checkout: its commands and recipes work, in several processes too."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from helpers.tiny_run import ROOT, write_recordings


# As small as the demo's recipe gets.
SMALL = [
    "--phases", "[{train: joint, steps: 100, learning_rate: 1e-3}]", "--steps_scale", "0.02",
    "--global_batch_size", "4", "--num_workers", "0", "--tracker", "none",
    "--encoder.num_hidden_layers", "1", "--encoder.hidden_size", "16", "--encoder.intermediate_size", "16",
    "--encoder.codebook_size", "16", "--tokenizer.teacher_layers", "[0, 1]", "--tokenizer.num_hidden_layers", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an environment `env` that holds the wheel, and, by a .pth file, the packages of this one."""
    place = tmp_path_factory.mktemp("place")
    source = place / "source"
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in ("pyproject.toml", "README.md", "LICENSE", *(name for name in files if name.startswith("bridle_hf/"))):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(place)]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(place / "env", with_pip=False, symlinks=True)
    (wheel,) = place.glob("*.whl")
    python = str(place / "env" / "bin" / "python")
    # Without PYTHONPATH: pip would find the checkout there, and have nothing to install.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [*pip, "--python", python, "install", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, env=kept)
    (packages,) = (place / "env" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    write_recordings(place / "data", count=8)
    return place


def run(place: Path, program: str, *words: str) -> str:
    """What a program of the environment prints, started outside of any checkout."""
    dropped = ("PYTHONPATH", "ACCELERATE", "OMP")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    done = subprocess.run(
        [str(place / "env" / "bin" / program), *words],
        cwd=place,
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_wheel_has_the_command_and_its_recipes(place):
    assert "audio_demo " in run(place, "bridle", "recipes")
    where = run(place, "python", "-c", "from importlib.util import find_spec; print(find_spec('bridle_hf').origin)")
    assert Path(where.strip()).is_relative_to(place / "env")


def test_pretraining_from_the_wheel(place):
    run(place, "bridle", "pretrain", "audio_demo", "--data", "data", "--output_dir", "one", *SMALL)
    assert (place / "one" / "encoder" / "README.md").exists() and (place / "one" / "report.html").exists()


@pytest.mark.slow
def test_two_processes_from_the_wheel(place):
    # "multi_gpu" is what accelerate calls several processes; where there is no GPU they meet over gloo.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    recipe = ["-m", "bridle_hf.pretraining", "audio_demo", "--data", "data", "--output_dir", "two"]
    run(place, "python", *launch, *recipe, *SMALL)
    assert '"processes": 2' in (place / "two" / "run.json").read_text(encoding="utf-8")
