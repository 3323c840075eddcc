"""The output folder of a run: whose it is, what may be removed, and who holds it."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.tiny_run import ROOT

from bridle_hf.common import output_folder
from bridle_hf.common.output_folder import FINETUNING, PRETRAINING, SHARDS, changed, hash_of_names, prepare, release


KINDS = pytest.mark.parametrize("kind", [PRETRAINING, FINETUNING, SHARDS], ids=lambda kind: kind.name)
HOLD = """
import sys, time
from pathlib import Path
from bridle_hf.common.output_folder import PRETRAINING, prepare

lock = prepare(Path(sys.argv[1]), PRETRAINING, {}, resume=True)
print("held", flush=True)
time.sleep(60)
"""


def fill(out, *names):
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")


@KINDS
def test_what_is_not_a_run_is_refused_and_stays(tmp_path, kind):
    """What others call checkpoints, a saved model, a folder of another kind, a record that nobody can read."""
    others = {"pretraining": "fine-tuning", "fine-tuning": "pretraining", "shards": "pretraining"}[kind.name]
    contents = {
        "thesis": ["thesis.txt", "checkpoints/best.pt"],
        "model": ["config.json", "model.safetensors", "README.md"],
        "other": ["run.json", "plan.json", "checkpoints/step_1/state.json", "checkpoints/checkpoint-1/state.json"],
        "broken": ["run.json", "plan.json"],
    }
    for name, files in contents.items():
        out = tmp_path / name
        fill(out, *files)
        if name == "other":
            (out / kind.record).write_text(f'{{"kind": "{others}"}}')
        if name == "broken":
            (out / kind.record).write_text('{"kind": ')
        for options in ({"resume": True}, {"overwrite": True}, {}):
            expected = f"does not hold a run of {kind.name}" if options else "is not empty"
            with pytest.raises(ValueError, match=expected):
                prepare(out, kind, {}, **options)
        assert all((out / file).exists() for file in files)


def test_overwrite_removes_what_matches_and_no_more(tmp_path):
    ours = ["run.json", "skipped.jsonl", "model.safetensors", "checkpoints/checkpoint-3/optimizer.pt"]
    theirs = ["thesis.txt", "checkpoints/step_2/state.json", "model_of_mine.py"]
    fill(tmp_path, *ours, *theirs)
    (tmp_path / "run.json").write_text('{"kind": "fine-tuning"}')
    prepare(tmp_path, FINETUNING, {}, resume=True, overwrite=True).release()
    assert all((tmp_path / name).exists() for name in ours), "resume wins"
    prepare(tmp_path, FINETUNING, {}, overwrite=True).release()
    assert not any((tmp_path / name).exists() for name in ours) and all((tmp_path / name).exists() for name in theirs)


def test_links_are_not_followed(tmp_path):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    fill(elsewhere, "step_1/state.json", "config.json")
    out.mkdir()
    (out / "checkpoints").symlink_to(elsewhere)
    (out / "encoder").symlink_to(elsewhere)
    (out / "run.json").write_text('{"kind": "pretraining"}')
    prepare(out, PRETRAINING, {}, overwrite=True).release()
    assert (elsewhere / "step_1" / "state.json").exists() and (elsewhere / "config.json").exists()


@pytest.mark.parametrize("name", ["data", "model"])
def test_inputs_in_the_folder_are_refused(tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    fill(out, "set/a.wav", "run.json")
    (tmp_path / "link").symlink_to(out / "set")
    monkeypatch.chdir(tmp_path)
    for given in (str(out / "set"), "out/set", "link", "out/set/shard-*.tar", "out/set/{0..3}.tar"):
        with pytest.raises(ValueError, match=f"--{name} .*lies inside output_dir"):
            prepare(out, PRETRAINING, {name: given}, overwrite=True)
    with pytest.raises(ValueError, match=f"is --{name} itself"):
        prepare(out, PRETRAINING, {name: "out/../out"}, overwrite=True)
    for given in ("org/name", "https://server/out/a.tar", None):
        prepare(tmp_path / "new", PRETRAINING, {name: given}, resume=True).release()


def test_a_folder_within_the_data_is_refused(tmp_path):
    fill(tmp_path, "a.png")
    with pytest.raises(ValueError, match="would become data"):
        prepare(tmp_path / "runs" / "1", PRETRAINING, {"data": str(tmp_path)})
    assert not (tmp_path / "runs").exists()


def test_two_runs_on_one_folder(tmp_path):
    """The second is refused while the first lives, and goes on as soon as it has been killed."""
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, env=environment)
    try:
        assert first.stdout.readline() == b"held\n"
        (out / "checkpoints").mkdir()
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=f"another run writes to .*process {first.pid} on .*; wait"):
                prepare(out, PRETRAINING, {}, **options)
        assert (out / "checkpoints").exists()
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    lock = prepare(out, PRETRAINING, {}, resume=True)
    assert prepare(out, PRETRAINING, {}, resume=True) is lock, "a run of this process may go on"
    release(lock)
    assert not any(path.suffix == ".json" for path in out.iterdir()), "nothing of this process is left"


def test_where_nothing_can_be_locked_the_run_says_so_and_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(self, **options):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(output_folder.FileLock, "acquire", refuse)
    prepare(tmp_path / "out", PRETRAINING, {})
    assert "cannot be locked" in caplog.text and "No locks available" in caplog.text


def test_what_has_changed_is_named():
    assert changed({"a": 1, "b": [2], "c": 0}, {"a": 1, "b": [3], "d": None, "c": 1}, {"c"}) == ["b ([3], now [2])"]
    assert hash_of_names(["/x/a.wav", "/x/b.wav"]) == hash_of_names(["/y/z/a.wav", "/y/z/b.wav"])
    assert hash_of_names(["/x/a.wav", "/x/b.wav"]) != hash_of_names(["/x/b.wav", "/x/a.wav"])
