"""The demo: the whole way on real data, in minutes on two cores (`make demo`).

It makes the data, then runs the commands that a user would run: pretrain (encoder, tokenizer, encoder), probe each
encoder beside its controls, fine-tune beside the same network from scratch, and ask a `pipeline` about a recording
that was in none of it. It ends with a table, and where the pictures and the report lie.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from transformers import AutoConfig, AutoModel, pipeline

import bridle_hf  # noqa: F401 (registers the models)
from bridle_hf.cards.card import write_card
from bridle_hf.common.errors import RunError
from bridle_hf.common.files import write_json
from bridle_hf.common.skipped import SkippedFiles
from bridle_hf.data.batches import iterate_eval
from bridle_hf.data.decoding import read_audio
from bridle_hf.data.finding import find_samples
from bridle_hf.data.folds import assign_folds
from bridle_hf.data.labels import Labels
from bridle_hf.data.modalities import load_processor, make_sample_loader
from bridle_hf.demos.arguments import DemoArguments
from bridle_hf.demos.data import make_digits, make_moving_digits, render_notes
from bridle_hf.monitoring.report import write_report
from bridle_hf.probing.features import collect_features, untrained_encoder
from bridle_hf.probing.probes import linear_probe, majority


SHOWN_POOLINGS = ("mean_std", "mean")
BRIDLE = [sys.executable, "-m", "bridle_hf.commands"]
CORES = os.cpu_count() or 1
HALF_THE_CORES, ALL_CORES_BUT_ONE = max(1, CORES // 2), max(1, CORES - 1)


@dataclass(frozen=True)
class ProbeTask:
    """What a probe is asked: the columns of metadata.csv that say so, and how many folds its groups make."""

    title: str
    label_column: str = "label"
    group_column: str = "group"
    folds: int | None = None


@dataclass(frozen=True)
class Demo:
    """What the demo of one modality runs on. The first task is the one that is fine-tuned.

    Args:
        held_out: what fine-tuning is tested on, in words.
        held_out_fold: the fold of the first task's probe that is tested on the same.
        unseen: whether pretraining, too, was kept from it.
        busy_loader: whether reading takes a core of its own in pretraining.
    """

    make_data: Callable[[], str]
    tasks: tuple[ProbeTask, ...]
    pretrain_options: tuple[str, ...]
    finetune_options: tuple[str, ...]
    held_out: str
    held_out_fold: str | None
    unseen: bool
    busy_loader: bool = False


DEMOS = {
    "audio": Demo(
        make_data=render_notes,
        tasks=(
            ProbeTask("instrument (112), whole octaves held out", folds=4),
            ProbeTask("pitch class (12), instruments held out", "pitch_class", "program", folds=4),
        ),
        pretrain_options=("--exclude_groups", "4"),
        finetune_options=("--eval_group", "4"),
        held_out="octave 4",
        held_out_fold="4",
        unseen=True,
    ),
    "image": Demo(
        make_data=make_digits,
        tasks=(ProbeTask("digit (10), 5 folds"),),
        pretrain_options=(),
        finetune_options=("--eval_fold", "1"),
        held_out="fold 1",
        held_out_fold="1",
        unseen=False,
        busy_loader=True,
    ),
    "video": Demo(
        make_data=make_moving_digits,
        tasks=(ProbeTask("direction (8), digit images held out", folds=5),),
        pretrain_options=(),
        finetune_options=("--validation_fraction", "0.2"),
        held_out="a fifth of the digit images",
        held_out_fold=None,
        unseen=False,
    ),
}


def run_demo(args: DemoArguments) -> Iterator[str]:
    """The demo; yields what it tells on the way, in lines.

    Raises:
        RunError: one of the commands failed, and has said why.
    """
    demo, out = DEMOS[args.modality], Path(args.output_dir)
    started = time.monotonic()
    data = args.data or demo.make_data()
    yield f"data: {data}"
    overwrite = ["--overwrite"] if args.overwrite else []
    words = command("pretrain", f"{args.modality}_demo", data, out / "pretraining", *overwrite,
                    *demo.pretrain_options, "--steps_scale", str(args.steps_scale))  # fmt: skip
    yield shown(words)
    run(words, threads=ALL_CORES_BUT_ONE if demo.busy_loader else None)
    yield "\nprobing frozen features"
    encoders = iteration_encoders(out / "pretraining")
    probes = probe_all(demo, args.modality, encoders, data, out)
    newest = encoders[max(encoders)]
    epochs = ["--num_train_epochs", str(args.finetune_epochs)] if args.finetune_epochs else []
    options = ("--model", str(newest), *demo.finetune_options, *epochs, *overwrite)
    finetune, scratch = (command("finetune", f"{args.modality}_demo_finetune", data, out / name, *options)
                         for name in ("classifier", "from_scratch"))  # fmt: skip
    scratch.append("--from_scratch")
    yield from map(shown, (scratch, finetune))
    # Side by side: two small trainings of half the cores each are sooner done than one after the other.
    with in_background(scratch):
        run(finetune, threads=HALF_THE_CORES)
    finetuned = {name: accuracy_of(out / name) for name in ("classifier", "from_scratch")}
    table = make_table(demo, probes, finetuned)
    table["notes"].append(ask_pipeline(demo, out / "classifier", data))
    table["notes"].append(f"The whole demo took {(time.monotonic() - started) / 60:.1f} minutes.")
    yield from finish(out, demo, table, probes)


def command(name: str, recipe: str, data: str, output_dir: Path, *options: str) -> list[str]:
    """The words of one of the package's commands."""
    return [name, recipe, "--data", data, "--output_dir", str(output_dir), *options]


def shown(words: list[str]) -> str:
    """A command as a user would type it."""
    return f"\n$ bridle {shlex.join(words)}"


def run(words: list[str], threads: int | None = None) -> None:
    """Run a command."""
    done = subprocess.run([*BRIDLE, *words], env=_environment(threads), check=False)
    if done.returncode:
        raise RunError(f"`bridle {words[0]}` ended with status {done.returncode}, see its message above")


@contextmanager
def in_background(words: list[str]) -> Iterator[None]:
    """Run a command beside what the block does, on half of the cores; if it fails, its last line is told."""
    with tempfile.TemporaryFile("w+") as printed:
        environment = _environment(HALF_THE_CORES)
        process = subprocess.Popen([*BRIDLE, *words], env=environment, stdout=printed, stderr=subprocess.STDOUT)
        try:
            yield
            process.wait()
        finally:
            process.kill()
        if process.returncode:
            printed.seek(0)
            last = printed.read().strip().rpartition("\n")[2]
            raise RunError(f"`bridle {words[0]}` ended with status {process.returncode}: {last}")


def _environment(threads: int | None) -> dict[str, str]:
    return os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def iteration_encoders(pretraining: Path) -> dict[int, Path]:
    """Folder of the encoder that each iteration ended with."""
    phases = json.loads((pretraining / "run.json").read_text(encoding="utf-8"))["phases"]
    return {
        phase["iteration"]: pretraining / "iterations" / f"{number}_{phase['kind']}" / "encoder"
        for number, phase in enumerate(phases)
        if phase["kind"] != "tokenizer"
    }


def probe_all(demo: Demo, modality: str, encoders: dict[int, Path], data: str, out: Path) -> dict[str, Any]:
    """Frozen linear probes of every encoder and of the controls, on every task.

    Returns:
        By task title, by features, by pooling: `score`, `per_fold`, and `folds`, the one fold or group that each
        tests, or `None` where there are several.
    """
    features, kept = read_features(encoders, data, out)
    jobs = {}
    for task in demo.tasks:
        samples = find_samples(data, modality, None, task.label_column, task.group_column)
        samples = [samples[index] for index in kept]
        labels, folds = Labels(samples).encode(samples).numpy(), assign_folds(samples, task.folds)
        tested = [
            {sample.fold or sample.group for sample in np.array(samples)[folds == fold]} for fold in np.unique(folds)
        ]
        groups = [names.pop() if len(names) == 1 else None for names in tested]
        jobs[task.title, "majority", ""] = (majority, (labels, folds), groups)
        for name, poolings in features.items():
            # One pooling is enough to see a second task beside the first.
            wanted = SHOWN_POOLINGS if task is demo.tasks[0] else SHOWN_POOLINGS[:1]
            for pooling in [pooling for pooling in (*wanted, "") if pooling in poolings]:
                jobs[task.title, name, pooling] = (linear_probe, (poolings[pooling], labels, folds), groups)
    # One thread each: a logistic regression of this size gains nothing from a second one.
    with ProcessPoolExecutor(max_workers=2, initializer=threadpool_limits, initargs=(1,)) as pool:
        found = {key: pool.submit(function, *arguments) for key, (function, arguments, _) in jobs.items()}
        results: dict[str, Any] = {}
        for (title, name, pooling), future in found.items():
            result = future.result()
            entry = {"score": result.score, "per_fold": list(result.per_fold), "folds": jobs[title, name, pooling][2]}
            results.setdefault(title, {}).setdefault(name, {})[pooling] = entry
    return results


def read_features(
    encoders: dict[int, Path], data: str, out: Path
) -> tuple[dict[str, dict[str, np.ndarray]], list[int]]:
    """Features of every sample under every encoder and control, and which samples could be read."""
    models = {f"iteration {number}": AutoModel.from_pretrained(path) for number, path in encoders.items()}
    models["untrained encoder"] = untrained_encoder(next(iter(models.values())))
    config = models["untrained encoder"].config
    samples = find_samples(data, config.modality)
    options = json.loads((out / "pretraining" / "run.json").read_text(encoding="utf-8"))["arguments"]["loader"]
    load = make_sample_loader(config, load_processor(str(next(iter(encoders.values()))), config), options)
    ledger = SkippedFiles(out / "pretraining" / "skipped.jsonl", len(samples))
    kept: list[int] = []

    def batches() -> Iterator[dict[str, Any]]:
        for indices, batch in iterate_eval(samples, load, 128, ledger, num_workers=1):
            kept.extend(indices)
            yield batch

    return collect_features(models, batches()), kept


def accuracy_of(folder: Path) -> float:
    """Accuracy that fine-tuning measured on what it held out."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results["evaluation"]["accuracy"]


def make_table(demo: Demo, probes: dict[str, Any], finetuned: dict[str, float]) -> dict[str, Any]:
    """The table of results.json: one row per features, percent; with what must be known to read it."""
    first, *others = demo.tasks
    columns = ["", first.title, f"{demo.held_out} alone", *(task.title for task in others)]
    rows = []
    for name, poolings in probes[first.title].items():
        for pooling, entry in poolings.items():
            label = f"{name}, {pooling.replace('_', '+')} pooling" if pooling else name
            alone = ""
            if demo.held_out_fold is not None:
                alone = f"{100 * entry['per_fold'][entry['folds'].index(demo.held_out_fold)]:.1f}"
            more = [_percent(probes[task.title][name].get(pooling)) for task in others]
            rows.append([label, _percent(entry), alone, *more])
    arms = {"fine-tuned from the last iteration": "classifier", "the same from scratch": "from_scratch"}
    for label, name in arms.items():
        rows.append([label, "", f"{100 * finetuned[name]:.1f}", *[""] * len(others)])
    seen = "The folds of the probes are of inputs that pretraining had seen, without their labels"
    if demo.unseen:
        seen += f", but for {demo.held_out}, which it never did"
    notes = [
        "Accuracy in percent. The first rows are linear probes of frozen features: mean over folds (lowest-highest).",
        f"{seen}.",
        f"{demo.held_out} alone: trained with labels on all else and tested there, by probe and by fine-tuning.",
    ]
    return {"title": "Frozen probes and fine-tuning", "columns": columns, "rows": rows, "notes": notes}


def _percent(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    low, high = min(entry["per_fold"]), max(entry["per_fold"])
    return f"{100 * entry['score']:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def ask_pipeline(demo: Demo, classifier: Path, data: str) -> str:
    """What the classifier says of one input that it was not trained on, through `pipeline`."""
    config = AutoConfig.from_pretrained(classifier)
    tested = [
        sample
        for sample in find_samples(data, config.modality)
        if demo.held_out_fold in (None, sample.fold, sample.group)
    ]
    sample = tested[len(tested) // 3]
    given: Any = sample.path
    if config.modality == "audio":
        waveform, rate = read_audio(sample.path)
        given = {"raw": waveform[0], "sampling_rate": rate}
    answers = pipeline(f"{config.modality}-classification", str(classifier))(given, top_k=3)
    said = ", ".join(f"{answer['label']} ({answer['score']:.0%})" for answer in answers)
    return f"{Path(sample.path).name} is: {sample.label}. The classifier says: {said}"


def finish(out: Path, demo: Demo, table: dict[str, Any], probes: dict[str, Any]) -> Iterator[str]:
    """results.json, report, cards; then the lines that tell of them."""
    pretraining = out / "pretraining"
    write_json(pretraining / "results.json", [table])
    write_json(out / "probes.json", probes)
    report = write_report(pretraining)
    run_json = json.loads((pretraining / "run.json").read_text(encoding="utf-8"))
    write_card(pretraining / "encoder", run_json, card_results(demo, probes))
    lines = [table["columns"], *table["rows"]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table["columns"]))]
    yield ""
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
    yield from ("", *table["notes"])
    yield f"\nreport:     {report}\npictures:   {pretraining / 'figures'}"
    yield f"encoder:    {pretraining / 'encoder'}\ntokenizer:  {pretraining / 'tokenizer'}"
    yield f"classifier: {out / 'classifier'}"


def card_results(demo: Demo, probes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The probes of the last iteration as a model card takes them, with their controls."""
    results = {}
    for task in demo.tasks:
        rows = probes[task.title]
        newest = max(name for name in rows if name.startswith("iteration"))
        scores = {name: (row.get(SHOWN_POOLINGS[0]) or row[""])["score"] for name, row in rows.items()}
        value = scores.pop(newest)
        seen = f"pretraining saw the inputs without labels{f', but for {demo.held_out}' if demo.unseen else ''}"
        note = f"frozen linear probe, mean over folds; {seen}"
        results[task.title] = {"metric": "accuracy", "value": value, "controls": scores, "note": note}
    return results
