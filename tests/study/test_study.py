"""A study from its grid to its report: what is run, done again, goes on and fails; bits; refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_study import STEPS, write_grid
from helpers.waiting import DEADLINE
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bridle_hf.common.errors import ArgumentError
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.configs import make_configs
from bridle_hf.probing.readouts import PRIMARY, READOUTS
from bridle_hf.study.arguments import StudyArguments
from bridle_hf.study.curves import draw_curves, table_of_curves
from bridle_hf.study.grid import FOLDER, read_grid
from bridle_hf.study.prefixes import shared_prefixes
from bridle_hf.study.report import progress, write_report
from bridle_hf.study.results import append_result, bits, gather, read_results, unbits
from bridle_hf.study.run import carry_out
from bridle_hf.study.study import run_study


RQ = {"phases": [STEPS, {"like": 1, "steps": 2}, {"like": 2, "steps": 2}]}
TUNING = {"steps": 3, "batch_size": 4, "shares": [0.05, 0.5, 1]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("study")
    grid = write_grid(folder, data)
    run_study(StudyArguments(grid, str(folder / "out"), workers=2))
    return grid, folder / "out"


# Grids


def test_the_grids_of_the_package_can_be_read():
    for path in FOLDER.glob("*.yaml"):
        runs = read_grid(path.stem)
        assert len({run.hash for run in runs}) == len(runs) > 10, path
        assert all(run.options["keep_iterations"] for run in runs)


@pytest.mark.parametrize("grid", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_arm_of_the_package_has_models_and_a_schedule(grid):
    """An arm that cannot start shows here, not after hours of others."""
    for run in {(run.set, run.arm): run for run in read_grid(grid)}.values():
        # Encoders to go on from are made by runs of their own.
        args = PretrainArguments(data="-", output_dir="-", **run.options | {"encoder_from": None})
        encoder, tokenizer = make_configs(args)
        schedule = Schedule(args.phases, 60.0, args.steps_scale, tokenizer.tokenizer_type == "kmeans")
        assert schedule.total_steps > 100 and encoder.patch_grid == tokenizer.patch_grid, run.name


def test_arms_are_changes_to_a_recipe(tmp_path, data):
    arms = {
        "rq": {},
        "rq_long": {"phases": [{"like": 0, "steps_of": [0, 1, 2]}, {"like": 2, "target": "features", "steps": 3}]},
        "narrow": {"encoder": {"num_codebooks": 1}},
        "continued": {"encoder_from": "runs/{seed}/encoder"},
    }
    runs = {
        run.arm: run for run in read_grid(write_grid(tmp_path, data, arms=arms, seeds=[3], options={"log_every": 7}))
    }
    assert runs["rq"].options["log_every"] == 7 and runs["rq"].options["seed"] == 3
    first, second = runs["rq_long"].options["phases"]
    recipe = runs["rq"].options["phases"]
    assert first == {**recipe[0], "steps": 18}
    assert second == {**recipe[2], "target": "features", "steps": 3}
    assert runs["narrow"].options["encoder"] == {**runs["rq"].options["encoder"], "num_codebooks": 1}
    assert runs["continued"].options["encoder_from"] == "runs/3/encoder"


def test_what_a_grid_names_comes_first_and_all_goes_seed_by_seed(tmp_path, data):
    sounds = {"data": str(data), "recipe": "audio_demo", "tasks": {"kind": {}}}
    arms = {"mae": {}, "rq": {"seeds": [0, 1, 2]}, "input": {"features": "input", "seeds": [0]}}
    grid = write_grid(tmp_path, data, arms=arms, first=["input", "rq"], sets={"a": sounds, "b": sounds})
    assert [f"{run.arm} {run.set} {run.seed}" for run in read_grid(grid)] == [
        "rq a 0", "input a 0", "rq b 0", "input b 0", "rq a 1", "rq b 1",
        "mae a 0", "mae b 0", "mae a 1", "mae b 1", "rq a 2", "rq b 2",
    ]  # fmt: skip


def test_the_report_says_what_is_done_of_an_unfinished_study(tmp_path, data):
    grid = read_grid(write_grid(tmp_path, data))
    row = {"hash": grid[0].hash, "status": "done"}
    assert progress(grid, [{**row, "hash": spec.hash} for spec in grid]) == "7 of 7 runs are done."
    (rq,) = [spec for spec in grid if (spec.arm, spec.seed) == ("rq", 1)]
    (bad,) = [spec for spec in grid if spec.arm == "bad"]
    rows = [{**row, "hash": rq.hash}, {"hash": bad.hash, "status": "failed"}, {**row, "hash": "of another grid"}]
    lines = progress(grid, rows).splitlines()
    assert lines[0].startswith("1 of 7 runs are done, 1 failed.")
    assert "| rq | 1 of 2 |" in lines and "| bad | 0 of 1 |" in lines and "| mae | 0 of 2 |" in lines


def test_a_hash_is_of_what_decides_the_result(tmp_path, data):
    def hashes(**changes):
        return {(run.arm, run.seed): run.hash for run in read_grid(write_grid(tmp_path, data, **changes))}

    before = hashes()
    assert before["rq", 0] == "e49acb586cf27dfd", "a study would do anew what it has done"
    assert hashes(options={"log_every": 3, "num_workers": 1}) == before
    assert not set(hashes(options={"steps_scale": 0.5}).values()) & set(before.values())
    assert len(set(before.values())) == len(before) == 7
    tuned = hashes(arms={"rq": RQ, "tuned": {**RQ, "finetune": {}}, "longer": {**RQ, "finetune": {"steps": 301}}})
    assert hashes(arms={"rq": {**RQ, "readouts": []}}) == {("rq", seed): before["rq", seed] for seed in (0, 1)}
    assert not set(hashes(arms={"rq": {**RQ, "readouts": ["attentive"]}}).values()) & set(before.values())
    assert len(set(tuned.values())) == 6 and tuned["rq", 0] == before["rq", 0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": [0]}, "unknown key 'seed'; did you mean 'seeds'?"),
        ({"sets": {"note": {}}}, "no set 'note'; did you mean 'notes'?"),
        ({"sets": {"mine": {"data": "x"}}}, "sets.mine: needs data, recipe and tasks"),
        ({"sets": {"digits": {"arms": {"vp": {}}}}}, "no arm 'vp'"),
        ({"arms": {"rq": {"encoders": {}}}}, "sounds, rq: unknown argument 'encoders'; did you mean 'encoder'?"),
        ({"arms": {"rq": {"features": "new"}}}, "features is 'new'"),
        ({"arms": {"rq": {"phases": [{"like": 5}]}}}, "sounds, rq"),
        ({"comparisons": ["rq"]}, "comparisons: 'rq'"),
        ({"arms": {"rq": {"finetune": {"step": 3}}}}, "sounds, rq: FewLabels"),
        ({"arms": {"rq": {"finetune": {"shares": [0]}}}}, "sounds, rq: shares are [0]"),
        ({"arms": {"rq": {"features": "input", "finetune": {}}}}, "finetune is for an encoder"),
        ({"arms": {"rq": {"readouts": ["attention"]}}}, "no read-out 'attention' to add: attentive"),
        ({"arms": {"rq": {"readouts": ["gate"]}}}, "no read-out 'gate' to add"),
        ({"arms": {"rq": {"readouts": ["attentive"], "finetune": {}}}}, "leave one of them out"),
        ({"first": ["mea"]}, "first: no arm 'mea'; did you mean 'mae'?"),
        ({"curves": {"RQ": "rq@0"}}, "curves: 'rq@0': expected names"),
        ({"curves": ["rq@0"]}, "curves: ['rq@0']: expected names"),
    ],
    ids=str,
)
def test_wrong_grids_are_refused(tmp_path, data, changes, expected):
    with pytest.raises(ArgumentError) as caught:
        read_grid(write_grid(tmp_path, data, **changes))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# Runs


def test_a_run_in_this_process(tmp_path, data):
    """Its scores are of what it leaves; called again, it has nothing to train and finds the same."""
    arms = {"rq": {"phases": [STEPS], "readouts": ["attentive"]}}
    (spec,) = read_grid(write_grid(tmp_path, data, seeds=[0], arms=arms))
    assert carry_out(spec, None, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["scores"].keys() == {"kind"} and result["scores"]["kind"].keys() == {"iteration 0"}
    found = result["scores"]["kind"]["iteration 0"]
    assert found.keys() == {*(readout.name for readout in READOUTS), "attentive/last/linear"}
    for entry in found.values():
        assert unbits(entry["correct"], 24).mean() == pytest.approx(entry["score"], abs=1e-4)
    assert 0 < result["cpu_seconds"]["iteration 0"] < 60
    assert carry_out(spec, None, tmp_path / "run")
    again = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert again["scores"] == result["scores"]


def test_few_labels_of_an_encoder_and_from_scratch(tmp_path, data):
    """The same samples, apart from the groups that they are tested on; the pretrained encoder is that of the arm."""
    arms = {
        "rq": {"phases": [STEPS]},
        "tuned": {"phases": [STEPS], "finetune": {**TUNING, "learning_rate": 0.0}},
        "scratch": {"features": "untrained", "phases": [STEPS], "finetune": {**TUNING, "learning_rate": 0.0}},
    }
    rq, *specs = read_grid(write_grid(tmp_path, data, arms=arms, seeds=[1]))
    shared = shared_prefixes([rq, *specs], tmp_path)
    results = {}
    for spec in specs:
        assert carry_out(spec, None, tmp_path / spec.arm, shared[spec.hash])
        results[spec.arm] = json.loads((tmp_path / spec.arm / "result.json").read_text(encoding="utf-8"))
    tuned, scratch = (results[arm] for arm in ("tuned", "scratch"))
    assert tuned["items"] == scratch["items"]
    groups = tuned["items"]["clusters"]["kind"]
    assert len(groups) == 6 and len(set(groups)) == 1
    (found,), (drawn,) = (list(result["scores"]["kind"].items()) for result in (tuned, scratch))
    assert (found[0], drawn[0]) == ("iteration 0", "scratch")
    for _, shares in (found, drawn):
        # Of 9 of each of two labels, in three groups of 6.
        assert {share: entry["labels"] for share, entry in shares.items()} == {"5%": 2, "50%": 8, "100%": 18}
        for entry in shares.values():
            assert unbits(entry["correct"], 6).mean() == pytest.approx(entry["score"], abs=1e-4)
    (prefix,) = shared[rq.hash]
    whole, ours = (
        load_file(folder / "encoder" / "model.safetensors") for folder in (prefix.folder, tmp_path / "tuned")
    )
    assert all((ours[name] == whole[name]).all() for name in whole), "rq and its fine-tuning share all phases"


@pytest.mark.slow
def test_few_labels_in_the_report(tmp_path, data):
    arms = {
        "tuned": {"phases": [STEPS], "finetune": TUNING},
        "scratch": {"features": "untrained", "phases": [STEPS], "finetune": TUNING},
    }
    grid = write_grid(tmp_path, data, arms=arms, comparisons=[["tuned@0", "scratch"]])
    rows = run_study(StudyArguments(grid, str(tmp_path / "out"), workers=2))
    text = write_report(StudyArguments(grid, str(tmp_path / "out"), report=True)).read_text(encoding="utf-8")
    scores = {
        (row["arm"], row["seed"]): {share: 100 * entry["score"] for share, entry in found.items()}
        for row in rows
        for found in row["scores"]["kind"].values()
    }
    for arm, source in (("tuned", "tuned@0"), ("scratch", "scratch")):
        means = {share: np.mean([scores[arm, seed][share] for seed in (0, 1)]) for share in ("5%", "50%", "100%")}
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {source}: sounds, kind | 2 |")]
        cells = [cell.split(" ± ")[0].strip() for cell in line.split("|")[3:6]]
        assert cells == [f"{mean:.1f}" for mean in means.values()] and "(8)" in line
    gain = np.mean([scores["tuned", seed]["50%"] - scores["scratch", seed]["50%"] for seed in (0, 1)])
    assert f"| tuned@0 - scratch | sounds, kind, 50% | 2 | {gain:+.1f} |" in text
    assert "| fine-tuned | seeds | 5% | 50% | 100% |" in text
    assert (tmp_path / "out" / "figures" / "few_labels.png").stat().st_size > 1000


@pytest.mark.slow
def test_one_line_per_run_with_its_scores_as_bits(finished):
    rows = {(row["arm"], row["seed"]): row for row in read_results(finished[1])}
    once = {(arm, 0) for arm in ("input", "untrained", "bad")}
    assert set(rows) == {(arm, seed) for arm in ("rq", "mae") for seed in (0, 1)} | once
    found = {arm: set(rows[arm, 0]["scores"]["kind"]) for arm in ("input", "untrained", "rq", "mae")}
    assert found == {
        "input": {"patches", "log-mel regression", "majority"},
        "untrained": {"untrained"},
        "rq": {"iteration 0", "iteration 1"},
        "mae": {"iteration 0"},
    }
    row = rows["rq", 1]
    assert (row["status"], row["seed"], row["options"]["seed"]) == ("done", 1, 1) and row["revision"]
    for readout in READOUTS:
        entry = row["scores"]["kind"]["iteration 1"][readout.name]
        correct = unbits(entry["correct"], 24)
        assert len(correct) == 24 and correct.mean() == pytest.approx(entry["score"], abs=1e-4)  # folds of one size
    assert row["items"]["hash"] == rows["input", 0]["items"]["hash"]


@pytest.mark.slow
def test_a_run_that_fails_is_kept_with_its_error_and_done_again_if_asked(finished):
    grid, out = finished
    (row,) = [row for row in read_results(out) if row["status"] == "failed"]
    assert row["arm"] == "bad" and "hidden_size" in row["error"]
    before = (out / "results.jsonl").read_bytes()
    run_study(StudyArguments(grid, str(out), workers=2))
    assert (out / "results.jsonl").read_bytes() == before, "what is done is not done again"
    run_study(StudyArguments(grid, str(out), retry_failed=True))
    assert len((out / "results.jsonl").read_bytes().splitlines()) == len(before.splitlines()) + 1


@pytest.mark.slow
def test_nothing_heavy_is_left(finished):
    left = {path.name for path in (finished[1] / "runs").rglob("*") if path.is_file() and "bad" not in str(path)}
    assert left <= {"run.json", "metrics.jsonl", ".lock"}


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_with_the_same_result(tmp_path, data):
    """The study is killed in the middle of a run: its process stops, and the next call goes on from its checkpoint."""
    phases = [{"like": 0, "steps": 60}]
    grid = write_grid(
        tmp_path, data, arms={"rq": {"phases": phases}}, seeds=[0], options={"keep_iterations": True, "save_every": 2}
    )
    command = [sys.executable, "-m", "bridle_hf.commands", "study", grid, "--output_dir"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([*command, str(tmp_path / "out")], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE
    while not list((tmp_path / "out").glob("runs/*/checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (resumed,) = run_study(StudyArguments(grid, str(tmp_path / "out")))
    (undisturbed,) = run_study(StudyArguments(grid, str(tmp_path / "other")))
    assert resumed["status"] == "done" and resumed["scores"] == undisturbed["scores"]


# Results and report


@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back(values):
    assert unbits(bits(np.array(values, dtype=bool)), len(values)).tolist() == values


def test_a_line_cut_short_is_left_out_and_the_next_is_whole(tmp_path):
    append_result(tmp_path, {"hash": "a", "score": 1})
    with open(tmp_path / "results.jsonl", "a", encoding="utf-8") as file:
        file.write('{"hash": "b", "sc')
    append_result(tmp_path, {"hash": "c", "score": 3})
    append_result(tmp_path, {"hash": "a", "score": 2})
    assert read_results(tmp_path) == [{"hash": "a", "score": 2}, {"hash": "c", "score": 3}]


def test_learning_curves_set_time_against_accuracy_seed_by_seed(tmp_path):
    """Seed 2 of the short run has none to be compared with; a row of earlier code has no time, and is no point."""

    def row(arm: str, seed: int, right: int, seconds: dict[str, float]) -> dict:
        correct = bits(np.arange(10) < right)
        return {
            "hash": f"{arm}{seed}", "set": "sounds", "arm": arm, "seed": seed, "features": "trained", "status": "done",
            "items": {"hash": "x"}, **seconds,
            "scores": {"kind": {"iteration 0": {PRIMARY.name: {"score": right / 10, "correct": correct}}}},
        }  # fmt: skip

    def took(minutes: float) -> dict:
        return {"cpu_seconds": {"iteration 0": 60 * minutes}}

    rows = [row("long", 0, 8, took(10)), row("long", 1, 6, took(20)), row("long", 3, 1, {})]
    rows += [row("short", 0, 7, took(5)), row("short", 1, 6, took(5)), row("short", 2, 2, took(5))]
    (tmp_path / "items").mkdir()
    items = json.dumps({"kind": [str(number) for number in range(10)]})
    (tmp_path / "items" / "sounds-x.json").write_text(items, encoding="utf-8")
    scores, curves = gather(rows, tmp_path), {"whole": ["long@0"], "part": ["short@0", "longer@0"]}
    assert table_of_curves(scores, curves).splitlines()[2:] == [
        "| sounds, kind | whole | long@0 | 2 | 15.0 | 70.0 ± 14.1 |  |  |",
        "| sounds, kind | part | short@0 | 3 | 5.0 | 50.0 ± 26.5 | 0.38 | -5.0 ± 7.1 |",
    ]
    draw_curves(tmp_path / "none.png", scores, curves)
    assert not (tmp_path / "none.png").exists(), "no curve has two points"
    draw_curves(tmp_path / "curves.png", scores, {"both": ["short@0", "long@0"]})
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_report_is_of_the_results(finished, tmp_path):
    grid, out = finished
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- grid: differences -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    text = write_report(StudyArguments(grid, str(out), report=True, page=str(page))).read_text(encoding="utf-8")
    rows = {(row["arm"], row["seed"]): row for row in read_results(out)}
    mean = np.mean([rows["rq", seed]["scores"]["kind"]["iteration 1"][PRIMARY.name]["score"] for seed in (0, 1)])
    line = next(line for line in text.splitlines() if line.startswith("| rq@1 | 2 |"))
    assert f"| {100 * mean:.1f} ± " in line
    gains = [
        rows["rq", seed]["scores"]["kind"]["iteration 0"][PRIMARY.name]["score"]
        - rows["mae", seed]["scores"]["kind"]["iteration 0"][PRIMARY.name]["score"]
        for seed in (0, 1)
    ]
    assert f"| rq@0 - mae@0 | sounds, kind | 2 | {100 * np.mean(gains):+.1f} |" in text
    assert "rq@1 - patches" in text and "nothing" not in text
    filled = page.read_text(encoding="utf-8")
    assert filled.startswith("before\n") and filled.endswith("after\n") and "old" not in filled and "mae@0" in filled
    assert (out / "figures" / "scores_sounds.png").stat().st_size > 1000
    assert (out / "figures" / "differences.png").stat().st_size > 1000


@pytest.mark.slow
def test_what_cannot_be_reported_is_refused(tmp_path, finished):
    with pytest.raises(ArgumentError, match="no results"):
        write_report(StudyArguments(finished[0], str(tmp_path), report=True))
    (tmp_path / "page.md").write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match="no mark"):
        write_report(StudyArguments(finished[0], str(finished[1]), report=True, page=str(tmp_path / "page.md")))
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ArgumentError, match="does not hold a run of a study"):
        run_study(StudyArguments(finished[0], str(tmp_path)))
    with pytest.raises(ArgumentError, match="--only rp"):
        run_study(StudyArguments(finished[0], str(finished[1]), only=["rp"]))
    assert json.loads((finished[1] / "run.json").read_text(encoding="utf-8"))["kind"] == "a study"
