"""The demo's whole way, on a few notes, digits or videos and steps."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from helpers.waiting import DEADLINE

from bridle_hf import commands
from bridle_hf.common.errors import RunError
from bridle_hf.demos import demo as demo_room
from bridle_hf.demos.data import make_digits, make_moving_digits, render_notes


ROOT = Path(__file__).parents[2]
IN_BACKGROUND = demo_room.in_background


@pytest.fixture(scope="module")
def in_this_process():
    """The demo's commands without the start of a process each."""

    def run(words, threads=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        commands.run(None, list(words))
        AcceleratorState._reset_state(reset_partial_state=True)

    @contextlib.contextmanager
    def in_background(words):
        run(words)
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_room, "run", run)
        patch.setattr(demo_room, "in_background", in_background)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory, in_this_process) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    notes = render_notes(folder, programs=range(0, 40, 8), pitches=range(36, 84, 4))
    return folder / "out", run_here("audio", folder / "out", notes)


def words_of(modality: str, out: Path, data: str) -> list[str]:
    words = ["--modality", modality, "--output_dir", str(out), "--data", data]
    return [*words, "--steps_scale", "0.003", "--finetune_epochs", "1"]


def run_here(modality: str, out: Path, data: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        commands.run("demo", words_of(modality, out, data))
    return printed.getvalue()


def test_the_table_has_every_arm_and_control(demo):
    out, printed = demo
    (table,) = json.loads((out / "pretraining/results.json").read_text())
    arms = [row[0] for row in table["rows"]]
    for name in ("iteration 0", "iteration 1", "untrained encoder", "log-mel regression"):
        assert {f"{name}, mean+std pooling", f"{name}, mean pooling"} <= set(arms)
    assert {"majority", "fine-tuned from the last iteration", "the same from scratch"} <= set(arms)
    assert all(row[0] in printed for row in table["rows"])
    assert "without their labels" in printed and "octave 4" in printed


def test_the_held_out_octave_was_in_no_training(demo):
    out, _ = demo
    run = json.loads((out / "pretraining/run.json").read_text())
    assert run["arguments"]["exclude_groups"] == ["4"] and run["samples"] == 5 * 9
    results = json.loads((out / "classifier/results.json").read_text())
    assert "group 4" in json.dumps(results)


def test_pictures_report_and_cards_are_there(demo):
    out, printed = demo
    pretraining = out / "pretraining"
    names = {path.name.split("_phase")[0] for path in (pretraining / "figures").glob("*_phase_*.png")}
    assert names == {"masked_input", "codes", "predictions"}
    report = (pretraining / "report.html").read_text()
    assert "log-mel regression" in report and "data:image/png;base64" in report
    assert str(pretraining / "report.html") in printed
    card = (pretraining / "encoder/README.md").read_text()
    assert "instrument (112), whole octaves held out" in card and "untrained encoder" in card
    assert (out / "classifier/README.md").exists() and (pretraining / "tokenizer/README.md").exists()


def test_the_pipeline_names_general_midi_instruments(demo):
    out, printed = demo
    config = json.loads((out / "classifier/config.json").read_text())
    assert "Acoustic Grand Piano" in config["id2label"].values()
    assert "The classifier says: " in printed


def few_digits(folder: Path) -> str:
    digits = Path(make_digits(folder))
    header, *rows = (digits / "metadata.csv").read_text().splitlines()
    (digits / "metadata.csv").write_text("\n".join([header, *rows[::47]]) + "\n")
    return str(digits)


@pytest.mark.parametrize(
    ("modality", "make_data", "control"),
    [
        pytest.param("image", few_digits, "pixel regression", marks=pytest.mark.slow, id="image"),
        pytest.param(
            "video",
            lambda folder: make_moving_digits(folder, num_clips=80),
            "frame regression",
            marks=pytest.mark.slow,
            id="video",
        ),
    ],
)
def test_the_whole_way_of_pixels(tmp_path, in_this_process, modality, make_data, control):
    printed = run_here(modality, tmp_path / "out", make_data(tmp_path))
    pretraining = tmp_path / "out" / "pretraining"
    (table,) = json.loads((pretraining / "results.json").read_text())
    arms = [row[0] for row in table["rows"]]
    assert {"iteration 0, mean pooling", "iteration 1, mean pooling", "untrained encoder, mean pooling"} <= set(arms)
    assert any(arm.startswith(control) for arm in arms) and "fine-tuned from the last iteration" in arms
    assert all(arm in printed for arm in arms) and "The classifier says: " in printed
    names = {path.name.split("_phase")[0] for path in (pretraining / "figures").glob("*_phase_*.png")}
    assert names == {"masked_input", "codes", "predictions"}
    assert control in (pretraining / "report.html").read_text()
    assert f"{modality}-classification" in (tmp_path / "out" / "classifier" / "README.md").read_text()


@pytest.mark.slow
def test_a_command_that_fails_ends_the_demo(tmp_path):
    """In processes of their own: what the one in the background said last is told."""
    words = ["probe", "--model", str(tmp_path / "nowhere"), "--data", str(tmp_path)]
    with (
        pytest.raises(RunError, match=r"`bridle probe` ended with status 2: error: .*nowhere"),
        IN_BACKGROUND(words),
    ):
        pass


@pytest.mark.slow
def test_the_demo_in_processes_of_its_own(tmp_path):
    out, digits = tmp_path / "out", few_digits(tmp_path)
    command = [sys.executable, str(ROOT / "training/demo.py"), *words_of("image", out, digits)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "$ bridle pretrain image_demo" in result.stdout and "The classifier says: " in result.stdout
