"""Prefixes: runs that go on from phases which another has done are, to the bit, what they would have been alone."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers.tiny_run import rows, weights
from helpers.tiny_study import STEPS, write_grid
from safetensors.torch import load_file

from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.configs import make_configs
from bridle_hf.study.arguments import StudyArguments
from bridle_hf.study.grid import RunSpec, read_grid
from bridle_hf.study.prefixes import prefixes_of, shared_prefixes
from bridle_hf.study.results import read_results
from bridle_hf.study.run import carry_out
from bridle_hf.study.study import run_study


TAUGHT, LAST = {"like": 1, "steps": 2}, {"like": 2, "steps": 2}
UNTIL = {"like": 0, "steps": 12, "until": {"accuracy_gain": 0.9, "over": 2}}
# Each with the number of phases that it shares with `rq`.
ARMS = {
    "rq": (2, {"phases": [STEPS, TAUGHT, LAST]}),
    "warm": (2, {"phases": [STEPS, TAUGHT, {**LAST, "start": "continue"}]}),
    "features": (2, {"phases": [STEPS, TAUGHT, {**LAST, "target": "features"}]}),
    "centred": (1, {"tokenizer": {"teacher_layers": [1, 2], "center_teacher": True}, "phases": [STEPS, TAUGHT, LAST]}),
    "dropout": (1, {"tokenizer_patch_dropout": 0.5, "phases": [STEPS, TAUGHT, LAST]}),
    "joint": (1, {"phases": [STEPS, {**LAST, "train": "joint"}]}),
    "kmeans": (1, {"tokenizer": {"tokenizer_type": "kmeans"}, "phases": [STEPS, LAST]}),
    "refreshed": (
        1,
        {
            "tokenizer": {"tokenizer_type": "kmeans"},
            "phases": [STEPS, {**LAST, "train": "alternate", "switch_every": 1}],
        },
    ),
    "tuned": (3, {"finetune": {"steps": 2}, "phases": [STEPS, TAUGHT, LAST]}),
    "wide": (0, {"encoder": {"intermediate_size": 48}, "phases": [STEPS, TAUGHT, LAST]}),
    "average": (0, {"encoder_ema": 0.9, "phases": [STEPS, TAUGHT, LAST]}),
    "level1": (0, {"encoder": {"codebook_loss_weights": [1, 0]}, "phases": [STEPS, TAUGHT, LAST]}),
    "long": (0, {"phases": [{**STEPS, "steps": 4}, TAUGHT, LAST]}),
    "warmer": (0, {"phases": [{**STEPS, "warmup_steps": 0}, TAUGHT, LAST]}),
    "hidden": (0, {"masks": {"random": 2.0}, "phases": [STEPS, TAUGHT, LAST]}),
}


def specs_of(folder: Path, data: Path, **arms) -> list[RunSpec]:
    return read_grid(write_grid(folder, data, arms=arms, seeds=[0]))


def test_runs_share_the_phases_up_to_which_all_that_counts_is_the_same(tmp_path, data):
    specs = specs_of(tmp_path, data, **{arm: changes for arm, (_, changes) in ARMS.items()})
    ours, *others = ({prefix.folder for prefix in prefixes_of(spec, tmp_path)} for spec in specs)
    assert {spec.arm: len(ours & theirs) for spec, theirs in zip(specs[1:], others)} == {
        arm: shared for arm, (shared, _) in ARMS.items() if arm != "rq"
    }


def test_another_seed_set_or_control_shares_nothing(tmp_path, data):
    grid = read_grid(write_grid(tmp_path, data))
    folders = {(spec.arm, spec.seed): {prefix.folder for prefix in prefixes_of(spec, tmp_path)} for spec in grid}
    assert len(folders["rq", 0]) == len(folders["rq", 1]) == 3 and not folders["rq", 0] & folders["rq", 1]
    assert not folders["input", 0] | folders["untrained", 0], "nothing is trained"
    assert not any(shared_prefixes(grid, tmp_path).values()), "what one run alone needs is not kept"


@pytest.mark.parametrize("grid", ["development", "reported"])
def test_prefixes_of_the_grids_of_the_package_can_start(grid, tmp_path):
    specs = {(spec.set, spec.arm): spec for spec in read_grid(grid) if spec.seed == 0}
    shared = shared_prefixes(list(specs.values()), tmp_path)
    assert len(shared[specs[next(iter(specs))[0], "rq"].hash]) == 3
    for prefix in {prefix.folder: prefix for prefixes in shared.values() for prefix in prefixes}.values():
        make_configs(PretrainArguments(data="-", output_dir="-", **prefix.options))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["features", "warm", "centred", "kmeans", "dropout", "joint", "refreshed"])
def test_a_run_from_a_prefix_is_the_run_done_whole(arm, tmp_path, data):
    """Models of all iterations, scores, and what was logged after the prefix."""
    shared, changes = ARMS[arm]
    first, second = specs_of(tmp_path, data, rq=ARMS["rq"][1], arm=changes)
    check_branches(first, second, shared, tmp_path)


@pytest.mark.slow
def test_a_phase_of_a_prefix_that_evidence_has_ended(tmp_path, data):
    first, second = specs_of(
        tmp_path, data, rq={"phases": [UNTIL, TAUGHT]}, warm={"phases": [UNTIL, {**TAUGHT, "steps": 4}]}
    )
    check_branches(first, second, 1, tmp_path)
    assert rows(tmp_path / "whole")[-1]["step"] < 12 + 4


@pytest.mark.slow
def test_an_average_of_the_weights_goes_on_too(tmp_path, data):
    changes = {"encoder_ema": 0.9}
    first, second = specs_of(
        tmp_path, data, rq={**changes, "phases": [STEPS, TAUGHT]}, warm={**changes, "phases": [STEPS, LAST]}
    )
    check_branches(first, second, 1, tmp_path)


def prefix_logs(out: Path) -> dict[Path, bytes]:
    return {path: (path / "metrics.jsonl").read_bytes() for path in (out / "prefixes").iterdir()}


def check_branches(first: RunSpec, second: RunSpec, shared: int, folder: Path) -> None:
    prefixes = shared_prefixes([first, second], folder)
    assert [prefix.phases for prefix in prefixes[second.hash]] == list(range(1, shared + 1))
    assert carry_out(first, None, folder / "first", prefixes[first.hash])
    trained = prefix_logs(folder)
    assert len(trained) == shared
    assert carry_out(second, None, folder / "branched", prefixes[second.hash])
    assert prefix_logs(folder) == trained, "what was there is not trained again"
    assert carry_out(second, None, folder / "whole")
    whole, branched = weights(folder / "whole"), weights(folder / "branched")
    assert whole.keys() == branched.keys() and all((branched[name] == whole[name]).all() for name in whole)
    for path in (folder / "whole" / "iterations").glob("*/*/model.safetensors"):
        expected, found = load_file(path), load_file(folder / "branched" / path.relative_to(folder / "whole"))
        assert all((found[name] == expected[name]).all() for name in expected)
    results = [json.loads((folder / name / "result.json").read_text()) for name in ("whole", "branched")]
    assert results[0]["scores"] == results[1]["scores"] and results[0]["items"] == results[1]["items"]
    logged = [[row for row in rows(folder / name) if row["phase"] >= shared] for name in ("whole", "branched")]
    assert logged[0] == logged[1] != []


@pytest.mark.slow
def test_a_study_trains_each_prefix_once_and_removes_it(tmp_path, data):
    arms = {arm: ARMS[arm][1] for arm in ("rq", "warm", "centred")}
    grid = write_grid(tmp_path, data, arms=arms)
    found = run_study(StudyArguments(grid, str(tmp_path / "out"), workers=2, keep_models=True))
    assert [row["status"] for row in found] == ["done"] * 6
    assert not list((tmp_path / "out" / "prefixes").iterdir())
    logs = " ".join(path.read_text() for path in (tmp_path / "out" / "runs").glob("*.log"))
    # Of both seeds the second prefix and `centred` go on from the first, `rq` and `warm` from the second.
    assert Counter(re.findall(r"resuming after step (\d of \d)", logs)) == {"2 of 4": 2, "4 of 6": 4, "2 of 6": 2}
    alone = run_study(StudyArguments(grid, str(tmp_path / "alone"), only=["warm"], seeds=[1]))
    assert alone[0]["scores"] == next(row for row in found if row["hash"] == alone[0]["hash"])["scores"]


@pytest.mark.slow
def test_a_prefix_that_is_broken_fails_one_run_alone(tmp_path, data):
    grid = write_grid(tmp_path, data, arms={arm: ARMS[arm][1] for arm in ("rq", "warm", "centred")}, seeds=[0])
    (spec, *_), out = read_grid(grid), tmp_path / "out"
    run_study(StudyArguments(grid, str(out), only=["rq"]))
    assert not (out / "prefixes").exists(), "no other run was asked for"
    *prefixes, _ = prefixes_of(spec, out)
    longest = prefixes[-1]
    assert carry_out(spec, None, tmp_path / "aside", prefixes)
    for path in longest.folder.glob("checkpoints/*/encoder.safetensors"):
        path.write_bytes(b"broken")
    found = {row["arm"]: row for row in run_study(StudyArguments(grid, str(out)))}
    assert [found[arm]["status"] for arm in ("rq", "warm", "centred")] == ["done", "failed", "done"]
    assert "broken" in found["warm"]["error"]
    assert run_study(StudyArguments(grid, str(out), only=["warm"], retry_failed=True))[0]["status"] == "done"
    assert {row["status"] for row in read_results(out)} == {"done"}
    assert not list((out / "prefixes").iterdir())
