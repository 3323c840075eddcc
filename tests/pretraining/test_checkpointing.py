"""Checkpoints against full disks, kills, truncated files and flipped bytes."""

import json
import logging
import os
import resource
import shutil
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle_hf.common import manifest
from bridle_hf.pretraining import checkpointing
from bridle_hf.pretraining.checkpointing import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)


def make_state(value: float) -> dict:
    parameter = torch.nn.Parameter(torch.full((300, 200), value))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "encoder": {"weight": parameter.detach().clone(), "transposed": torch.arange(6.0).view(2, 3).t()},
        "tokenizer": {"codes": torch.full((4,), value), "initialized": torch.tensor(True)},
        "optimizers": {"encoder": optimizer.state_dict()},
        "skipped": {"a.wav": "broken"},
        "value": value,
    }


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, make_state(float(step)), keep_last=2)
    return tmp_path


def test_round_trip(tmp_path):
    state = make_state(0.1)
    path = save_checkpoint(tmp_path, 7, state, keep_last=1)
    loaded = load_checkpoint(path)
    assert path.name == "step_7" and loaded["step"] == 7 and loaded["value"] == 0.1
    assert loaded["skipped"] == {"a.wav": "broken"}
    for side in ("encoder", "tokenizer"):
        assert loaded[side].keys() == state[side].keys()
        assert all(torch.equal(tensor, state[side][name]) for name, tensor in loaded[side].items())
    moment = loaded["optimizers"]["encoder"]["state"][0]["exp_avg"]
    assert torch.equal(moment, state["optimizers"]["encoder"]["state"][0]["exp_avg"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_7"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=6, unique=True), st.integers(1, 4))
def test_the_last_ones_are_kept(steps, keep):
    folder = checkpointing.Path(os.environ.get("TMPDIR", "/tmp")) / f"keep_last_{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    small = {"encoder": {"w": torch.zeros(1)}, "tokenizer": {"w": torch.zeros(1)}, "optimizers": {}}
    try:
        for step in sorted(steps):
            save_checkpoint(folder, step, small, keep)
        names = [path.name for path in list_checkpoints(folder)]
        assert names == [f"step_{step}" for step in sorted(steps)[-keep:]]
        assert load_newest(folder)["step"] == max(steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


FILES = ["encoder.safetensors", "tokenizer.safetensors", "optimizers.pt", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "missing"])
def test_a_broken_newest_is_passed_over(saved, caplog, name, damage):
    path = saved / "step_2" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(b"" if damage == "emptied" else content[:-7])
    with caplog.at_level(logging.WARNING):
        assert load_newest(saved)["value"] == 1.0
    (record,) = caplog.records
    named = "step_2" if name == "manifest.json" else name
    assert named in record.getMessage() or "manifest" in record.getMessage()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_flipped_byte_is_found(checkpoint, name, place, change):
    path = checkpoint / name
    content = path.read_bytes()
    position = int(place * len(content))
    path.write_bytes(content[:position] + bytes([content[position] ^ change]) + content[position + 1 :])
    try:
        state = load_checkpoint(checkpoint)
        # White space of the manifest may change.
        assert name == "manifest.json" and state["value"] == 3.0
    except CheckpointError as error:
        assert "step_3" in str(error)
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("flipped"), 3, make_state(3.0), keep_last=1)


def test_none_at_all_and_none_whole(tmp_path, saved):
    assert load_newest(tmp_path / "absent") is None
    for step in (1, 2):
        (saved / f"step_{step}" / "encoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match="--overwrite"):
        load_newest(saved)


@pytest.mark.parametrize("limit", [50_000, 300_000, 500_000])
def test_a_full_disk_leaves_the_one_before(saved, limit):
    """A limit on the size of files stands for it: writes fail in safetensors, in torch.save and in Python."""
    big = make_state(3.0)
    big["encoder"]["weight"] = torch.zeros(limit // 5)
    big["note"] = "x" * 600_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step_3.*the one before is intact"):
            save_checkpoint(saved, 3, big, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in saved.iterdir()) == ["step_1", "step_2"]
    assert load_newest(saved)["value"] == 2.0


@pytest.mark.parametrize("function", ["save_file", "sha256", "sync", "os.replace"])
def test_a_fault_in_the_middle_leaves_the_one_before(saved, monkeypatch, function):
    owner, name = {"os.replace": (checkpointing.os, "replace"), "save_file": (checkpointing, "save_file")}.get(
        function, (manifest, function)
    )

    def fail(*args):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Read-only"):
        patch.setattr(owner, name, fail)
        save_checkpoint(saved, 3, make_state(3.0), keep_last=1)
    assert sorted(path.name for path in saved.iterdir()) == ["step_1", "step_2"]
    assert load_newest(saved)["value"] == 2.0


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "checkpoints", 1, make_state(1.0), keep_last=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_error(saved):
    saved.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            save_checkpoint(saved, 3, make_state(3.0), keep_last=1)
        assert load_newest(saved)["value"] == 2.0
    finally:
        saved.chmod(0o700)


def test_what_a_killed_save_left_is_not_loaded_and_is_cleared(saved):
    shutil.copytree(saved / "step_2", saved / ".step_9.tmp")
    assert load_newest(saved)["step"] == 2
    save_checkpoint(saved, 3, make_state(3.0), keep_last=2)
    assert sorted(path.name for path in saved.iterdir()) == ["step_2", "step_3"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_broken_newer_ones_do_not_cost_the_one_just_written(saved, keep_last):
    """A run resumed from step 2, with steps 4 and 6 broken, is stopped at step 3."""
    for step in (4, 6):
        shutil.copytree(saved / "step_2", saved / f"step_{step}")
        (saved / f"step_{step}" / "state.json").write_text("{}")
    assert load_newest(saved)["step"] == 2
    save_checkpoint(saved, 3, make_state(3.0), keep_last)
    assert load_newest(saved)["value"] == 3.0


def test_an_old_one_that_cannot_be_removed_does_not_end_the_run(saved, monkeypatch, caplog):
    remove = shutil.rmtree

    def busy(path, *args, **kwargs):
        if path.name == "step_1":
            raise OSError(39, "Directory not empty", str(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(checkpointing.shutil, "rmtree", busy)
    save_checkpoint(saved, 3, make_state(3.0), keep_last=1)
    assert sorted(path.name for path in saved.iterdir()) == ["step_1", "step_3"]
    assert "step_1" in caplog.text and load_newest(saved)["step"] == 3


def test_nothing_is_unpickled_but_tensors(saved):
    """A checkpoint is data: one whose optimizers hold code is refused, though its checksums are right."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(saved / "run_by_pickle"),)

    torch.save({"encoder": Evil()}, saved / "step_2" / "optimizers.pt")
    hashes = json.loads((saved / "step_2" / "manifest.json").read_text())
    hashes["optimizers.pt"] = manifest.sha256(saved / "step_2" / "optimizers.pt")
    (saved / "step_2" / "manifest.json").write_text(json.dumps(hashes))
    assert load_newest(saved)["step"] == 1
    assert not (saved / "run_by_pickle").exists()
