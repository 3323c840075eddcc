"""One run of a study: pretrain in a folder of its own, read out what the features know, leave one result."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModel

from bridle_hf.common.arguments import make_arguments
from bridle_hf.common.files import write_json
from bridle_hf.common.output_folder import PRETRAINING, git_revision, prepare, release
from bridle_hf.common.signals import StopRequest
from bridle_hf.data.batches import iterate_eval
from bridle_hf.data.finding import find_samples
from bridle_hf.data.folds import assign_folds
from bridle_hf.data.labels import Labels
from bridle_hf.data.sample import Sample, spread
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.monitoring.metrics_log import read_metrics
from bridle_hf.patching_bridle import INPUT_NAMES
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.checkpointing import list_checkpoints
from bridle_hf.pretraining.pretrain import refusing
from bridle_hf.pretraining.run import Run, start
from bridle_hf.probing.features import INPUT_CONTROLS, collect_features
from bridle_hf.probing.few_labels import classify, draw_labelled, finetune_with
from bridle_hf.probing.probes import ProbeResult, linear_probe, majority
from bridle_hf.probing.readouts import ON_REQUEST, PCA_SAMPLES, READOUTS, collect_layers, encoder_tokens, patch_tokens
from bridle_hf.study.grid import RunSpec
from bridle_hf.study.prefixes import Prefix, branch
from bridle_hf.study.results import bits
from bridle_hf.study.sets import Task


RESULT = "result.json"


def carry_out(spec: RunSpec, cache_dir: str | None, folder: Path, prefixes: Sequence[Prefix] = ()) -> bool:
    """The run, from wherever it stands to its result, `folder/result.json`; whether it came to that.

    The set is made first, where it is missing. A signal ends pretraining at the next step, and a later call goes on.

    Args:
        prefixes: of the run, the shortest first: those that it shares. What is missing of them is trained.

    Raises:
        ArgumentError, RunError: as of pretraining.
    """
    data = spec.study_set.make(cache_dir)
    began = time.monotonic()
    with StopRequest() as stop:
        run = _prepared(spec.options, data, folder, prefixes, stop)
        trained = spec.features == "trained"
        if run is None or not (run.train(stop) if trained else stop.received is None):
            return False
    if trained:
        run.finish()
    else:
        release(run.lock)
    scores, items = (read_out if spec.finetune is None else fine_tune)(run, spec)
    metrics = read_metrics(folder / "metrics.jsonl")
    result = {
        "hash": spec.hash,
        "set": spec.set,
        "arm": spec.arm,
        "seed": spec.seed,
        "features": spec.features,
        "status": "done",
        "revision": git_revision(),
        "data": Path(data).name,
        "options": dict(spec.options),
        "finetune": spec.finetune and asdict(spec.finetune),
        "pretraining_seconds": round(run.seconds, 1),
        "cpu_seconds": cpu_seconds(metrics, run.schedule),
        "seconds": round(time.monotonic() - began, 1),
        "metrics": [row for row in metrics if "samples" in row or row.get("event")][-1:],
        "items": items,
        "scores": scores,
    }
    write_json(folder / RESULT, result)
    return True


def folder_of(spec: RunSpec, out: Path) -> Path:
    """Where a study in `out` does a run."""
    return out / "runs" / spec.name


def _prepared(
    options: Mapping[str, Any], data: str, folder: Path, prefixes: Sequence[Prefix], stop: StopRequest
) -> Run | None:
    """A run that goes on where it, or, before its first checkpoint, the longest of its prefixes has ended.

    `None` if a signal has come while a prefix was trained.
    """
    values = {**options, "data": data, "output_dir": str(folder), "resume": True}
    (args,) = make_arguments(PretrainArguments, recipe=None, values=values)
    with refusing():
        lock = prepare(folder, PRETRAINING, {"data": data}, resume=True)  # what another still writes is not looked at
    if prefixes and not list_checkpoints(folder / "checkpoints"):
        *shorter, longest = prefixes
        if not longest.folder.exists() and not _train(longest, data, shorter, stop):
            release(lock)
            return None
        with refusing():
            branch(longest, folder, args)
    with refusing():
        return start(args)


def _train(prefix: Prefix, data: str, shorter: Sequence[Prefix], stop: StopRequest) -> bool:
    """Whether a prefix came to its end."""
    run = _prepared(prefix.options, data, prefix.part, shorter, stop)
    if run is None or not run.train(stop):
        return False
    run.accelerator.end_training()
    release(run.lock)
    prefix.part.rename(prefix.folder)
    return True


def read_out(run: Run, spec: RunSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the features of an arm know: of each iteration, as drawn, or of the input itself.

    Returns:
        Scores by task, features and read-out: `score`, `per_fold`, and `correct`, of which samples the answer was
        right, as bits in hexadecimal (see [`bits`]); and which samples these are: a hash of their names, and by task
        `clusters`, what of those that are tested the bootstrap draws together.
    """
    config, load = run.encoder_config, run.load
    batch_size, kept = 128, []

    def batches(samples: Sequence[Sample]) -> Iterable[dict[str, Any]]:
        for indices, batch in iterate_eval(samples, load, batch_size, run.ledger):
            kept.extend(samples[index].path for index in indices)
            yield batch

    samples = asked(run, spec)
    if spec.features == "input":
        sources = {"patches": patch_tokens(config, batches(spread(run.samples, PCA_SAMPLES)))}
    else:
        sources = {name: encoder_tokens(encoder) for name, encoder in encoders(run, spec).items()}
    kept.clear()
    readouts = [*READOUTS, *(ON_REQUEST[name] for name in spec.readouts)]
    collected = collect_layers(sources, config, batches(samples), readouts)
    paths = list(kept)
    regression, _ = INPUT_CONTROLS[INPUT_NAMES[config.modality]]
    inputs = {}
    if spec.features == "input":
        encoder = {"untrained": run.interleaving.unwrapped_encoder.bridle}
        inputs = collect_features(encoder, batches(samples))[regression]
    scores: dict[str, Any] = {}
    items: dict[str, Any] = {"hash": _hash(paths), "clusters": {}}
    for name, task in spec.study_set.tasks.items():
        labels, folds, clusters = answers(run.args.data, run.args.modality, task, paths)
        tested = np.ones(len(paths), dtype=bool) if task.tested is None else folds == 0
        items["clusters"][name] = np.array(clusters)[tested].tolist()
        found = {
            source: {readout.name: readout(layers[readout.pooling], labels, folds) for readout in readouts}
            for source, layers in collected.items()
        }
        if inputs:
            pooling = "mean_std" if "mean_std" in inputs else ""
            found[regression] = {f"{pooling}/last/linear": linear_probe(inputs[pooling], labels, folds)}
            found["majority"] = {"": majority(labels, folds)}
        scores[name] = {
            source: {key: _plain(value, tested) for key, value in row.items()} for source, row in found.items()
        }
    return scores, items


def fine_tune(run: Run, spec: RunSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """How well the last encoder, or one as it is drawn, answers the first task on fold 0, fine-tuned on shares of the
    labels of the other folds.

    Returns:
        As [`read_out`]; in the place of read-outs there are the shares, as `10%`, with how many `labels` these are.
    """
    samples = asked(run, spec)
    kept = [index for indices, _ in iterate_eval(samples, run.load, 128, run.ledger) for index in indices]
    samples = [samples[index] for index in kept]
    name, task = next(iter(spec.study_set.tasks.items()))
    labels, folds, clusters = answers(run.args.data, run.args.modality, task, [sample.path for sample in samples])
    train, test = np.flatnonzero(folds != 0), np.flatnonzero(folds == 0)
    tested = [samples[index] for index in test]
    *_, (source, encoder) = encoders(run, spec).items()
    found = {}
    for share in spec.finetune.shares:
        labelled = train[draw_labelled(labels[train], share, spec.seed)]
        model = finetune_with(
            encoder.to(run.accelerator.device), samples, labels, labelled, run.load, spec.finetune, spec.seed
        )
        correct = classify(model, tested, run.load, run.ledger) == labels[test]
        score = round(float(correct.mean()), 5)
        found[f"{100 * share:g}%"] = {"score": score, "labels": len(labelled), "correct": bits(correct)}
    items = {
        "hash": _hash([sample.path for sample in tested]),
        "clusters": {name: [clusters[index] for index in test]},
    }
    return {name: {source if spec.features == "trained" else spec.arm: found}}, items


def asked(run: Run, spec: RunSpec) -> list[Sample]:
    """What the tasks are about: also what they test, where that was kept out of pretraining."""
    if any(task.tested for task in spec.study_set.tasks.values()):
        return find_samples(run.args.data, run.args.modality)
    return run.samples


def encoders(run: Run, spec: RunSpec) -> dict[str, Any]:
    """The encoder that each iteration ended with, or the one that the run would begin with."""
    if spec.features == "untrained":
        return {"untrained": run.interleaving.unwrapped_encoder.bridle}
    folders = [
        run.out / "iterations" / f"{number}_{phase.train}" / "encoder"
        for number, phase in enumerate(run.schedule.phases)
        if phase.trains_encoder
    ]
    return {f"iteration {number}": AutoModel.from_pretrained(folder) for number, folder in enumerate(folders)}


def cpu_seconds(metrics: Sequence[Mapping[str, Any]], schedule: Schedule) -> dict[str, float]:
    """What pretraining has taken up to the end of each iteration, by the rows of metrics.jsonl."""
    ends = [row for row in metrics if row.get("event") == "phase_end"]
    of_encoders = [row for row in ends if schedule.phases[row["phase"]].trains_encoder]
    # Phases that ended before there was such a number have none.
    return {
        f"iteration {number}": row["cpu_seconds"] for number, row in enumerate(of_encoders) if "cpu_seconds" in row
    }


def answers(data: str, modality: str, task: Task, paths: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels, folds and clusters of the samples at `paths`, in their order; what `task.tested` names is fold 0."""
    by_path = {
        column: {sample.path: sample for sample in find_samples(data, modality, None, task.label, column)}
        for column in {task.group, task.cluster or task.group}
    }
    samples = [by_path[task.group][path] for path in paths]
    groups = [by_path[task.cluster or task.group][path].group for path in paths]
    clusters = [str(number) if group is None else group for number, group in enumerate(groups)]
    labels = Labels(samples).encode(samples).numpy()
    if task.tested is None:
        return labels, assign_folds(samples, task.folds), clusters
    return labels, np.array([int(sample.group != task.tested) for sample in samples]), clusters


def _plain(result: ProbeResult, tested: np.ndarray) -> dict[str, Any]:
    """As JSON; of the first fold alone, where not all samples are `tested`."""
    score, per_fold = (result.score, result.per_fold) if tested.all() else (result.per_fold[0], result.per_fold[:1])
    plain: dict[str, Any] = {"score": round(score, 5), "per_fold": [round(value, 5) for value in per_fold]}
    return plain if result.correct is None else plain | {"correct": bits(result.correct[tested])}


def _hash(paths: list[str]) -> str:
    names = [Path(path).name for path in paths]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
