"""Grid of a study: sets x arms x seeds, from one YAML, as the list of its runs.

    seeds: [0, 1, 2]
    sets:                                   # each with changes to its recipe, and to arms on it
      notes: {}
      digits: {arms: {vq: {encoder: {codebook_size: 256}}}}
    options: {num_workers: 0}               # of all runs
    arms:                                   # each as changes to the set's recipe
      untrained: {features: untrained}
      input: {features: input, seeds: [0]}
      rq: {}
      vq: {encoder: {num_codebooks: 1, codebook_size: 1024}}
      rq_long: {phases: [{like: 0, steps_of: [0, 1, 2]}]}
    first: [input, untrained, rq, vq]       # whose runs of these seeds are done before all others

    comparisons: [[rq@1, vq@1]]             # of the report: first minus second, arm@iteration
    curves: {RQ: [rq_short@0, rq@0]}        # of the report: accuracy against time

A set is one of sets.py, or a folder: `mine: {data: DIR, recipe: audio_demo, tasks: {word: {group: voice}}}`.
An entry of an arm's `phases` that says `like: N` is phase N of the recipe with what else it says; `steps_of` gives it
the steps of these phases together. An arm's `features` are those of the encoder as `trained`, or `untrained`, as it is
drawn, or of the `input` itself; its `seeds` replace the grid's, and `only_sets` names the sets that it is for. Where
it has `finetune`, fields of [`FewLabels`], its encoder (as drawn: from scratch) is fine-tuned instead of read out;
with `readouts: [attentive]` its features are read out in this way, too. `{seed}` in an option's text is the run's
seed, as in `encoder_from: "runs/source/{seed}/encoder"`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridle_hf.common.arguments import make_arguments, merged, read_yaml
from bridle_hf.common.errors import ArgumentError, nearest
from bridle_hf.common.recipes import find_recipe
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.probing.few_labels import FewLabels
from bridle_hf.probing.readouts import ON_REQUEST, READOUTS
from bridle_hf.study.sets import SETS, StudySet, Task


FOLDER = Path(__file__).parent / "grids"
KEYS = ("seeds", "sets", "options", "arms", "first", "comparisons", "curves")
# What an arm says beside options of pretraining.
ARM_KEYS = ("features", "finetune", "readouts", "seeds", "only_sets")
FEATURES = ("trained", "untrained", "input")
DEFAULTS = json.loads(json.dumps(vars(PretrainArguments(data="-", output_dir="-"))))
# What cannot change a run's result.
FREE = {"data", "output_dir", "num_workers", "cache_mb", "tracker", "log_every", "save_every", "report_every",
        "keep_iterations", "resume", "overwrite"}  # fmt: skip


@dataclass(frozen=True)
class RunSpec:
    """One run of a grid.

    Args:
        options: all arguments of pretraining, but for data and output_dir.
        features: one of `FEATURES`.
        study_set: what `set` names.
        finetune: the encoder is fine-tuned in this way; `None`: read out as it is.
        readouts: names of those beside `READOUTS`.
    """

    set: str
    arm: str
    seed: int
    features: str
    options: Mapping[str, Any]
    study_set: StudySet
    finetune: FewLabels | None = None
    readouts: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Of all that decides its result, code and data apart."""
        names = sorted(readout.name for readout in READOUTS)
        parts = [self.set, self.features, self.seed, counted(self.options), names]
        if self.finetune is not None:
            parts.append({"finetune": asdict(self.finetune)})
        if self.readouts:
            parts.append({"readouts": sorted(self.readouts)})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.set}-{self.arm}-{self.seed}-{self.hash}"


def counted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide a result. Not what is as it is by default: an option that is new to pretraining makes no run
    another."""
    return {name: value for name, value in options.items() if name not in FREE and value != DEFAULTS.get(name)}


@dataclass(frozen=True)
class Comparison:
    """Two sources of features that the report sets side by side, as `rq@1` (arm and iteration) or `untrained`."""

    first: str
    second: str


def read_comparisons(name: str) -> list[Comparison]:
    """The comparisons that a grid asks for. ArgumentError: as `read_grid`."""
    return [Comparison(*pair) for pair in _read(name).get("comparisons", ())]


def read_curves(name: str) -> dict[str, list[str]]:
    """The learning curves that a grid asks for: sources, the shortest run first. ArgumentError: as `read_grid`."""
    return dict(_read(name).get("curves", {}))


def read_grid(name: str) -> list[RunSpec]:
    """The runs of a grid, in the order in which they are done, so that a study that is cut short tells something.

    First those of the arms that come `first`, of the grid's seeds; then all others. Both go seed by seed, so that
    there are pairs of all arms.

    Args:
        name: of a grid of the package, or the path of a file.

    Raises:
        ArgumentError: there is no such grid, or it says what cannot be done; names the key.
    """
    grid = _read(name)
    runs = [
        _run_spec(grid, set_name, arm_name, seed)
        for set_name in grid["sets"]
        for arm_name, arm in grid["arms"].items()
        if set_name in (arm or {}).get("only_sets", grid["sets"])
        for seed in (arm or {}).get("seeds", grid.get("seeds", [0]))
    ]
    first, seeds = set(grid.get("first", ())), set(grid.get("seeds", [0]))
    return sorted(runs, key=lambda run: (run.arm not in first or run.seed not in seeds, run.seed))


def _read(name: str) -> dict[str, Any]:
    path = find_recipe(name, FOLDER)
    try:
        grid = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"grid {path}: {error}") from error
    if not isinstance(grid, dict) or not grid.get("sets") or not grid.get("arms"):
        raise ArgumentError(f"grid {path}: expected a mapping with sets and arms")
    for key in grid:
        if key not in KEYS:
            raise ArgumentError(f"grid {path}: unknown key '{key}'{nearest(key, KEYS)}")
    for arm in grid.get("first", ()):
        if arm not in grid["arms"]:
            raise ArgumentError(f"grid {path}: first: no arm '{arm}'{nearest(str(arm), grid['arms'])}")
    for pair in grid.get("comparisons", ()):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ArgumentError(f"grid {path}: comparisons: {pair!r}: expected two names, as [rq@1, vq@1]")
    curves = grid.get("curves", {})
    mapping = isinstance(curves, dict)
    for curve in curves.values() if mapping else [curves]:
        if not (mapping and isinstance(curve, list) and curve and all(isinstance(name, str) for name in curve)):
            raise ArgumentError(f"grid {path}: curves: {curve!r}: expected names, as {{RQ: [rq@0, rq_2.5@0]}}")
    return grid


def _run_spec(grid: dict[str, Any], set_name: str, arm_name: str, seed: int) -> RunSpec:
    where = f"{set_name}, {arm_name}"
    for_set = dict(grid["sets"][set_name] or {})
    study_set = _study_set(set_name, for_set)
    on_set = for_set.pop("arms", {})
    if unknown := set(on_set) - set(grid["arms"]):
        raise ArgumentError(f"sets.{set_name}.arms: no arm '{min(unknown)}'{nearest(min(unknown), grid['arms'])}")
    changes: dict[str, Any] = {}
    for part in (
        study_set.options,
        grid.get("options") or {},
        for_set,
        grid["arms"][arm_name] or {},
        on_set.get(arm_name) or {},
    ):
        changes = merged(changes, part)
    features = changes.pop("features", "trained")
    if features not in FEATURES:
        raise ArgumentError(f"{where}: features is {features!r}: {', '.join(FEATURES)}")
    finetune = changes.pop("finetune", None)
    if finetune is not None and features == "input":
        raise ArgumentError(f"{where}: finetune is for an encoder: features is {features!r}")
    readouts = tuple(changes.pop("readouts", ()))
    if readouts and finetune is not None:
        raise ArgumentError(f"{where}: an encoder that finetune trains has no readouts: leave one of them out")
    for name in readouts:
        if ON_REQUEST.get(name) in (None, *READOUTS):
            known = [name for name, readout in ON_REQUEST.items() if readout not in READOUTS]
            raise ArgumentError(f"{where}: readouts: no read-out {name!r} to add: {', '.join(known)}")
    options = {
        name: value.replace("{seed}", str(seed)) if isinstance(value, str) else value
        for name, value in changes.items()
        if name not in ARM_KEYS
    }
    recipe = read_yaml(find_recipe(study_set.recipe).read_text(encoding="utf-8"))
    try:
        few_labels = None if finetune is None else FewLabels(**finetune)
        if "phases" in options:
            options["phases"] = [_phase(entry, recipe["phases"]) for entry in options["phases"]]
        (args,) = make_arguments(
            PretrainArguments,
            recipe=study_set.recipe,
            values={**options, "seed": seed, "data": "-", "output_dir": "-"},
        )
    except (ValueError, LookupError, TypeError) as error:
        raise ArgumentError(f"{where}: {error}") from error
    plain = json.loads(json.dumps(vars(args)))
    options = {name: plain[name] for name in plain if name not in ("data", "output_dir")}
    return RunSpec(set_name, arm_name, seed, features, options, study_set, few_labels, readouts)


def _study_set(name: str, entry: dict[str, Any]) -> StudySet:
    """One of `SETS`, or a folder that the grid describes; takes what describes it out of `entry`."""
    if name in SETS:
        return SETS[name]
    if "data" not in entry:
        raise ArgumentError(
            f"sets: no set '{name}'{nearest(name, SETS)}; one of your own needs data, recipe and tasks"
        )
    try:
        data, recipe = str(entry.pop("data")), str(entry.pop("recipe"))
        tasks = {task: Task(**columns) for task, columns in entry.pop("tasks").items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"sets.{name}: needs data, recipe and tasks, as {{NAME: {{label: COLUMN}}}}: {error}"
        ) from error
    return StudySet(lambda _: data, recipe, tasks)


def _phase(entry: Mapping[str, Any], phases: list[dict[str, Any]]) -> dict[str, Any]:
    """A phase of an arm, with what it takes from the recipe's."""
    changes = dict(entry)
    phase = dict(phases[changes.pop("like")]) if "like" in changes else {}
    if "steps_of" in changes:
        phase["steps"] = sum(phases[number]["steps"] for number in changes.pop("steps_of"))
    return phase | changes
