"""Tests of `bridle embed` and `bridle search`: tables, kills, broken files, several processes."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.pixels import save_pixel_encoder, write_pixels
from helpers.sound_files import write_m4a
from helpers.sounds import save_encoder, write_sounds, write_tones
from helpers.waiting import DEADLINE
from safetensors.torch import load_file, save_file

import bridle_hf
from bridle_hf.commands import main
from bridle_hf.common.errors import ArgumentError, RunError
from bridle_hf.embedding import embed as embed_module
from bridle_hf.embedding.embedder import Embedder
from bridle_hf.embedding.search import Neighbours
from bridle_hf.embedding.tables import read_table


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(embed_module, "MOST_FILES", 3)


def test_a_folder_becomes_a_table(model, tmp_path, small_parts):
    data = write_tones(tmp_path / "data", 10)
    (tmp_path / "data" / "class_0" / "03a.wav").write_bytes(b"no sound")
    made = bridle_hf.embed(data=data, model=model, output=str(tmp_path / "x.parquet"))
    assert made == {"output": str(tmp_path / "x.parquet"), "rows": 10, "samples": 10, "skipped": 1}
    table = read_table(tmp_path / "x.parquet")
    files = sorted(str(path) for path in (tmp_path / "data").rglob("*.wav") if path.name != "03a.wav")
    assert table.columns["id"].tolist() == [os.path.relpath(path, data) for path in files]
    assert table.columns["label"].tolist() == ["class_0"] * 5 + ["class_1"] * 5
    assert table.columns.keys() == {"id", "label"}
    np.testing.assert_allclose(table.values, Embedder.from_pretrained(model).embed(files), atol=1e-5)
    assert table.made["model"] == model and table.made["level"] == "clip"
    (line,) = (tmp_path / "x.parquet.skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("03a.wav") and "cannot be decoded" in json.loads(line)["reason"]
    assert not (tmp_path / "x.parquet.parts").exists()
    with pytest.raises(ArgumentError, match="exists: give --overwrite"):
        bridle_hf.embed(data=data, model=model, output=str(tmp_path / "x.parquet"))


def test_a_folder_of_what_libsndfile_cannot_read(model, tmp_path):
    """Apple's lossless codec: the rows of the same samples in wav."""
    write_tones(tmp_path / "wav", 4)
    (tmp_path / "m4a").mkdir()
    for path in (tmp_path / "wav").rglob("*.wav"):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        write_m4a(tmp_path / "m4a" / f"{path.stem}.m4a", samples.T, rate, "alac")
    tables = {}
    for kind in ("wav", "m4a"):
        output = str(tmp_path / f"{kind}.parquet")
        made = bridle_hf.embed(data=str(tmp_path / kind), model=model, output=output)
        assert (made["rows"], made["skipped"]) == (4, 0)
        tables[kind] = read_table(Path(output))
    assert [Path(name).stem for name in tables["m4a"].columns["id"]] == ["00", "01", "02", "03"]
    order = np.argsort([Path(name).stem for name in tables["wav"].columns["id"]])
    np.testing.assert_allclose(tables["m4a"].values, tables["wav"].values[order], atol=1e-4)


@pytest.mark.parametrize("options", [
    {}, {"layers": "all"}, {"layers": ["0", "-1"], "pooling": "mean_std"}, {"level": "frame"}, {"level": "patch"},
])  # fmt: skip
def test_formats_hold_the_same(model, tmp_path, small_parts, options):
    data = write_tones(tmp_path / "data", 4)
    tables = {}
    for suffix in ("parquet", "npz", "npy"):
        output = tmp_path / f"x.{suffix}"
        bridle_hf.embed(data=data, model=model, output=str(output), **options)
        tables[suffix] = None if suffix == "npy" else read_table(output)
    first, second = tables["parquet"], tables["npz"]
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.values, np.load(tmp_path / "x.npy"))
    assert first.columns.keys() == second.columns.keys()
    for name, column in first.columns.items():
        np.testing.assert_array_equal(column, second.columns[name])
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == first.columns["id"].tolist()
    files = sorted(str(path) for path in (tmp_path / "data").rglob("*.wav"))
    layers = {"layers": embed_module.read_layers([options["layers"]])} if options.get("layers") == "all" else {}
    if "layers" in options and not layers:
        layers = {"layers": [0, -1]}
    wanted = Embedder.from_pretrained(model).embed(files, **{**options, **layers})
    if options.get("level", "clip") == "clip":
        np.testing.assert_allclose(first.values, wanted, atol=1e-5)
    else:
        np.testing.assert_allclose(first.values, np.concatenate([entry.values for entry in wanted]), atol=1e-5)
        np.testing.assert_allclose(first.columns["time"], np.concatenate([entry.times for entry in wanted]))
    if options.get("level") == "patch":
        assert set(first.columns["band"]) == {0, 1}


@pytest.mark.parametrize("modality", ["image", "video"])
def test_pixels(modality, tmp_path):
    model = save_pixel_encoder(tmp_path / "model", modality)
    data = write_pixels(tmp_path / "data", modality, per_class=3)
    bridle_hf.embed(data=data, model=model, output=str(tmp_path / "x.npz"), pooling="region_mean")
    table = read_table(tmp_path / "x.npz")
    assert table.values.shape == (6, 64) and set(table.columns) == {"id", "label", "group"}


def test_search(model, tmp_path, capsys):
    data = write_sounds(tmp_path / "data")
    main("embed", [data, "--model", model, "--output", str(tmp_path / "x.parquet"), "--pooling", "mean_std"])
    assert "24 rows of 24 files" in capsys.readouterr().out
    main("search", [str(tmp_path / "x.parquet"), f"{data}/tone_3.wav", "--top_k", "5"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["similarity", "id", "label"] and len(rows) == 5
    assert rows[0].split()[:3] == ["1.0000", "tone_3.wav", "tone"]
    assert {row.split()[2] for row in rows} == {"tone"}
    similarities = [float(row.split()[0]) for row in rows]
    assert similarities == sorted(similarities, reverse=True)


def test_a_picture_of_the_neighbours(model, tmp_path, capsys):
    data = write_sounds(tmp_path / "data")
    table, picture = str(tmp_path / "x.parquet"), tmp_path / "found.png"
    bridle_hf.embed(data=data, model=model, output=table)
    search = [table, f"{data}/tone_3.wav", "--top_k", "3"]
    main("search", [*search, "--picture", str(picture)])
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    for name, reason in (
        ("found.jpg", "give a name that ends with .png"),
        ("other.png", "--picture: .*: no such file"),
    ):
        if name == "other.png":
            neighbour = Neighbours(table).find(search[1], 2)[1]["id"]
            (tmp_path / "data" / neighbour).unlink()
        with pytest.raises(SystemExit):
            main("search", [*search, "--picture", str(tmp_path / name)])
        assert re.search(reason, capsys.readouterr().err) and not (tmp_path / name).exists()


def test_what_is_wrong_is_said(model, tmp_path, capsys):
    data = write_tones(tmp_path / "data", 3)
    good = {"data": data, "model": model, "output": str(tmp_path / "x.npz")}
    for wrong, reason in [
        ({"output": str(tmp_path / "x.txt")}, r"--output .*x.txt: expected a name that ends in .parquet"),
        ({"model": str(tmp_path)}, "no model is there"),
        ({"layers": "7"}, "layers 7"),
        ({"layers": "last"}, "--layers last: numbers"),
        ({"pooling": "region_mean"}, "pooling 'region_mean'"),
        ({"data": str(tmp_path / "nothing")}, "nothing"),
        ({"output": f"{data}/x.npz"}, "lies inside --data"),
    ]:
        with pytest.raises(ArgumentError, match=reason):
            bridle_hf.embed(**{**good, **wrong})
    for path in Path(data).rglob("*.wav"):
        path.write_text("no sound")
    with pytest.raises(RunError, match="none of 3 files can be embedded"):
        bridle_hf.embed(**good)
    (tmp_path / "y.npz").write_bytes(b"no table")
    with pytest.raises(SystemExit):
        main("search", [str(tmp_path / "y.npz"), f"{data}/class_0/00.wav"])
    assert "y.npz is not a table" in capsys.readouterr().err


def test_other_arguments_do_not_go_on(model, tmp_path, small_parts, monkeypatch):
    data = write_tones(tmp_path / "data", 7)
    options = {"data": data, "model": model, "output": str(tmp_path / "x.npz")}
    monkeypatch.setattr(embed_module, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bridle_hf.embed(**options)
    monkeypatch.undo()
    monkeypatch.setattr(embed_module, "MOST_FILES", 3)
    with pytest.raises(ArgumentError, match=r"begun with other arguments: pooling \(None, now 'mean_std'\)"):
        bridle_hf.embed(**options, pooling="mean_std")
    Path(data, "class_0", "00b.wav").write_bytes(Path(data, "class_0", "00.wav").read_bytes())
    with pytest.raises(ArgumentError, match="the files"):
        bridle_hf.embed(**options)
    monkeypatch.setattr(embed_module, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bridle_hf.embed(**options, overwrite=True)
    monkeypatch.undo()
    monkeypatch.setattr(embed_module, "MOST_FILES", 3)
    shutil.copytree(model, tmp_path / "kept")
    weights = load_file(f"{model}/model.safetensors")
    try:
        changed = {name: value + 0.01 for name, value in weights.items()}
        save_file(changed, f"{model}/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ArgumentError, match="the weights of --model"):
            bridle_hf.embed(**options)
        assert bridle_hf.embed(**options, overwrite=True)["rows"] == 8
        other = Neighbours(options["output"])
        assert other.find(f"{data}/class_0/00.wav", 1)[0]["similarity"] == pytest.approx(1.0)
        with pytest.raises(ValueError, match="was made by other weights than those of"):
            Neighbours(options["output"], str(tmp_path / "kept"))
    finally:
        save_file(weights, f"{model}/model.safetensors", metadata={"format": "pt"})


def test_a_csv_that_another_wrote_stays(model, tmp_path):
    data = write_tones(tmp_path / "data", 3)
    (tmp_path / "birds.csv").write_text("my notes")
    with pytest.raises(ArgumentError, match=r"birds\.csv exists: give --overwrite"):
        bridle_hf.embed(data=data, model=model, output=str(tmp_path / "birds.npy"))
    assert (tmp_path / "birds.csv").read_text() == "my notes" and not (tmp_path / "birds.npy").exists()


def test_ids_are_of_the_folder_however_it_is_spelled(model, tmp_path, monkeypatch):
    """And of a list, the paths in it; a picture of the neighbours finds them all."""
    monkeypatch.chdir(tmp_path)
    write_tones(tmp_path / "d", 3)
    paths = sorted(str(path) for path in Path("d").rglob("*.wav"))
    (tmp_path / "list.csv").write_text("\n".join(["file_name", *paths, ""]))
    for number, data in enumerate(["d", "./d", "d/", "list.csv"]):
        output = str(tmp_path / f"{number}.npz")
        bridle_hf.embed(data=data, model=model, output=output)
        neighbours = Neighbours(output)
        rows = neighbours.find(paths[0], 2)
        assert rows[0]["id"] == (paths[0] if data == "list.csv" else paths[0].removeprefix("d/"))
        neighbours.draw(paths[0], rows)


KILLED = """
import sys
import torch
torch.set_num_threads(1)
from bridle_hf.embedding import embed
embed.MOST_FILES = 4
from bridle_hf.commands import main
main("embed", sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_at_random_moments_the_rows_are_equal(model, tmp_path):
    """Ten times, each killed one to three times after a random time, and then resumed to its end."""
    data = write_tones(tmp_path / "data", 60)
    Path(data, "class_1", "07a.wav").write_text("no sound")
    rng = random.Random(0)

    def start(output: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, data, "--model", model, "--output", str(output)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    began = time.monotonic()
    undisturbed = start(tmp_path / "undisturbed.npz")
    assert undisturbed.wait(DEADLINE) == 0, undisturbed.stderr.read()
    seconds = time.monotonic() - began
    wanted = read_table(tmp_path / "undisturbed.npz")
    assert len(wanted.values) == 60
    for number in range(10):
        output = tmp_path / f"{number}.npz"
        for _ in range(rng.randint(1, 3)):
            process = start(output)
            time.sleep(rng.uniform(0.5, 1.0) * seconds)
            process.send_signal(signal.SIGKILL)
            process.wait()
        if not output.exists() or (output.parent / f"{output.name}.parts").exists():
            process = start(output)
            assert process.wait(DEADLINE) == 0, process.stderr.read()
        found = read_table(output)
        np.testing.assert_array_equal(found.values, wanted.values)
        np.testing.assert_array_equal(found.columns["id"], wanted.columns["id"])


@pytest.mark.slow
def test_two_processes_write_what_one_does(model, tmp_path):
    data = write_tones(tmp_path / "data", 20)
    options = [data, "--model", model, "--output"]
    script = tmp_path / "embed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), str(script)]
        subprocess.run([*command, *options, str(tmp_path / f"{count}.npz")], check=True, env=environment)
    one, two = (read_table(tmp_path / f"{count}.npz") for count in (1, 2))
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.columns["id"], two.columns["id"])
    shutil.rmtree(tmp_path / "data")
