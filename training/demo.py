"""The demo: the whole way on real data, in minutes on two cores (`make demo`).

It makes the data, then runs the commands that a user would run: pretrain (encoder, tokenizer, encoder), probe each
encoder beside its controls, fine-tune beside the same network from scratch, and ask a `pipeline` about a recording
that was in none of it. Prints a table, and where the pictures and the report lie.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, pipeline


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bridle_hf  # noqa: F401 (registers the models)
from model_cards.card import write_card
from training.data import MODALITIES, Item, SkippedFiles, find_items, iterate_eval, read_audio
from training.demo_data import render_notes
from training.labels import Labels, assign_folds
from training.monitoring import write_json
from training.probes import collect_features, linear_probe, majority, untrained_encoder
from training.report import write_report


TRAINING = Path(__file__).parent
POOLINGS = ("mean_std", "mean")


@dataclass(frozen=True)
class Task:
    """What a probe is asked: the columns of metadata.csv that say so, and how many folds its groups make."""

    title: str
    label_column: str
    group_column: str
    folds: int


@dataclass(frozen=True)
class Demo:
    """What the demo of one modality runs on. The first task is the one that is fine-tuned."""

    make_data: Any
    recipe: str
    finetune_recipe: str
    held_out_group: str
    held_out_in_words: str
    tasks: tuple[Task, ...]
    pipeline_task: str


DEMOS = {
    "audio": Demo(
        make_data=render_notes,
        recipe="audio_demo.yaml",
        finetune_recipe="audio_demo_finetune.yaml",
        held_out_group="4",
        held_out_in_words="octave 4",
        tasks=(
            Task("instrument (112), whole octaves held out", "label", "group", 4),
            Task("pitch class (12), instruments held out", "pitch_class", "program", 4),
        ),
        pipeline_task="audio-classification",
    ),
}


def main() -> None:
    args = parse_arguments()
    demo, out = DEMOS[args.modality], Path(args.output_dir)
    started = time.monotonic()
    data = args.data or str(demo.make_data())
    print(f"data: {data}", flush=True)
    overwrite = ["--overwrite"] if args.overwrite else []
    run("pretrain.py", demo.recipe, data, out / "pretraining", *overwrite, "--exclude_groups", demo.held_out_group,
        "--steps_scale", str(args.steps_scale))  # fmt: skip
    encoders = iteration_encoders(out / "pretraining")
    probes = probe_all(demo, encoders, data, out)
    newest = encoders[max(encoders)]
    for name, extra in (("classifier", []), ("from_scratch", ["--from_scratch"])):
        run("finetune.py", demo.finetune_recipe, data, out / name, "--model", str(newest), "--eval_group",
            demo.held_out_group, "--num_train_epochs", str(args.finetune_epochs), *overwrite, *extra)  # fmt: skip
    finetuned = {name: accuracy_of(out / name) for name in ("classifier", "from_scratch")}
    table = make_table(demo, probes, finetuned)
    table["notes"].append(f"The whole demo took {(time.monotonic() - started) / 60:.1f} minutes.")
    answer = ask_pipeline(demo, out / "classifier", data)
    finish(out, demo, table, probes, answer)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", default="audio", choices=sorted(DEMOS))
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in output_dir")
    parser.add_argument("--data", help="folder that the demo's data was made into (default: made in the user's cache)")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="factor on the length of pretraining")
    parser.add_argument("--finetune_epochs", type=float, default=10)
    return parser.parse_args()


def run(script: str, recipe: str, data: str, output_dir: Path, *options: str) -> None:
    """One of the project's commands, shown as a user would type it."""
    command = [f"training/{script}", f"training/recipes/{recipe}", "--data", data, "--output_dir", str(output_dir)]
    print("\n$ python " + " ".join([*command, *options]), flush=True)
    paths = [str(TRAINING / script), str(TRAINING / "recipes" / recipe), *command[2:]]
    subprocess.run([sys.executable, *paths, *options], check=True)


def iteration_encoders(pretraining: Path) -> dict[int, Path]:
    """Folder of the encoder that each iteration ended with."""
    phases = json.loads((pretraining / "run.json").read_text(encoding="utf-8"))["phases"]
    return {
        phase["iteration"]: pretraining / "iterations" / f"{number}_{phase['kind']}" / "encoder"
        for number, phase in enumerate(phases)
        if phase["kind"] != "tokenizer"
    }


def probe_all(demo: Demo, encoders: dict[int, Path], data: str, out: Path) -> dict[str, Any]:
    """Frozen linear probes of every encoder and of the controls, on every task.

    Returns:
        By task title, by features, by pooling: `score`, `per_fold` and `folds`, the group that each fold tests.
    """
    print("\nprobing frozen features", flush=True)
    features, kept, items = read_features(demo, encoders, data, out)
    jobs = {}
    for task in demo.tasks:
        items = find_items(data, demo.modality, None, task.label_column, task.group_column)
        items = [items[index] for index in kept]
        labels, folds = Labels(items).encode(items).numpy(), assign_folds(items, task.folds)
        groups = [sorted({item.group for item, at in zip(items, folds) if at == fold}) for fold in np.unique(folds)]
        jobs[task.title, "majority", ""] = (majority, (labels, folds), groups)
        for name, poolings in features.items():
            for pooling in POOLINGS:
                jobs[task.title, name, pooling] = (linear_probe, (poolings[pooling], labels, folds), groups)
    # One thread each: a logistic regression of this size gains nothing from a second one.
    with ProcessPoolExecutor(max_workers=2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = {key: pool.submit(function, *arguments) for key, (function, arguments, _) in jobs.items()}
        results: dict[str, Any] = {}
        for (title, name, pooling), future in found.items():
            result = future.result()
            entry = {"score": result.score, "per_fold": list(result.per_fold), "folds": jobs[title, name, pooling][2]}
            results.setdefault(title, {}).setdefault(name, {})[pooling] = entry
    return results


def read_features(
    demo: Demo, encoders: dict[int, Path], data: str, out: Path
) -> tuple[dict[str, dict[str, np.ndarray]], list[int], list[Item]]:
    """Features of every item under every encoder and control, which items could be read, and all items."""
    models = {f"iteration {number}": AutoModel.from_pretrained(path) for number, path in encoders.items()}
    models["untrained encoder"] = untrained_encoder(next(iter(models.values())))
    processor = AutoFeatureExtractor.from_pretrained(next(iter(encoders.values())))
    config = models["untrained encoder"].config
    items = find_items(data, config.modality)
    load = MODALITIES[config.modality].loader(processor, max_frames=config.max_length)
    ledger = SkippedFiles(out / "pretraining" / "skipped.jsonl", len(items))
    kept: list[int] = []

    def batches() -> Iterator[dict[str, Any]]:
        for indices, batch in iterate_eval(items, load, 128, ledger, num_workers=1):
            kept.extend(indices)
            yield batch

    return collect_features(models, batches()), kept, items


def accuracy_of(folder: Path) -> float:
    """Accuracy that `finetune.py` measured on what it held out."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results["evaluation"]["accuracy"]


def make_table(demo: Demo, probes: dict[str, Any], finetuned: dict[str, float]) -> dict[str, Any]:
    """The table of results.json: one row per features, percent; with what must be known to read it."""
    first, *others = demo.tasks
    held_out = f"{demo.held_out_in_words} alone"
    columns = ["", first.title, held_out, *(task.title for task in others)]
    rows = []
    for name, poolings in probes[first.title].items():
        for pooling in poolings:
            entry = poolings[pooling]
            fold = entry["folds"].index([demo.held_out_group])
            cells = [_percent(entry["score"], entry["per_fold"]), f"{100 * entry['per_fold'][fold]:.1f}"]
            more = [probes[task.title][name][pooling] for task in others]
            label = f"{name}, {pooling.replace('_', '+')} pooling" if pooling else name
            rows.append([label, *cells, *(_percent(entry["score"], entry["per_fold"]) for entry in more)])
    rows.append(
        ["fine-tuned from the last iteration", "", f"{100 * finetuned['classifier']:.1f}", *[""] * len(others)]
    )
    rows.append(["the same from scratch", "", f"{100 * finetuned['from_scratch']:.1f}", *[""] * len(others)])
    notes = [
        "Accuracy in percent; the first rows are linear probes of frozen features, with the range over folds.",
        f"Pretraining never heard {demo.held_out_in_words}. The other groups it heard, without their labels: the folds "
        "of the probes that test those are of inputs seen unlabelled.",
        f"{held_out}: trained on all other groups with labels, tested on {demo.held_out_in_words}, by probe and by "
        "fine-tuning alike.",
    ]
    return {"title": "Frozen probes and fine-tuning", "columns": columns, "rows": rows, "notes": notes}


def _percent(score: float, per_fold: list[float]) -> str:
    return f"{100 * score:.1f} ({100 * min(per_fold):.0f}-{100 * max(per_fold):.0f})"


def ask_pipeline(demo: Demo, classifier: Path, data: str) -> str:
    """What the classifier says of an input that was in no training, through `pipeline`."""
    modality = AutoConfig.from_pretrained(classifier).modality
    items = [item for item in find_items(data, modality) if item.group == demo.held_out_group]
    item = items[len(items) // 3]
    waveform, rate = read_audio(item.path)
    answers = pipeline(demo.pipeline_task, str(classifier))({"raw": waveform[0], "sampling_rate": rate}, top_k=3)
    said = ", ".join(f"{answer['label']} ({answer['score']:.0%})" for answer in answers)
    return f"{Path(item.path).name} from {demo.held_out_in_words} is: {item.label}. The classifier says: {said}"


def finish(out: Path, demo: Demo, table: dict[str, Any], probes: dict[str, Any], answer: str) -> None:
    """results.json, report, cards; then tell."""
    table["notes"].append(answer)
    pretraining = out / "pretraining"
    write_json(pretraining / "results.json", [table])
    write_json(out / "probes.json", probes)
    report = write_report(pretraining)
    run_json = json.loads((pretraining / "run.json").read_text(encoding="utf-8"))
    write_card(pretraining / "encoder", run_json, card_results(demo, probes))
    widths = [max(len(str(row[column])) for row in [table["columns"], *table["rows"]])
              for column in range(len(table["columns"]))]  # fmt: skip
    print()
    for row in [table["columns"], *table["rows"]]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())
    print()
    for note in table["notes"]:
        print(note)
    print(f"\nreport:     {report}\npictures:   {pretraining / 'figures'}")
    print(f"encoder:    {pretraining / 'encoder'}\ntokenizer:  {pretraining / 'tokenizer'}")
    print(f"classifier: {out / 'classifier'}")


def card_results(demo: Demo, probes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The probes of the last iteration as a model card takes them, with their controls."""
    results = {}
    for task in demo.tasks:
        rows = probes[task.title]
        newest = max(name for name in rows if name.startswith("iteration"))
        scores = {name: (row.get(POOLINGS[0]) or row[""])["score"] for name, row in rows.items()}
        value = scores.pop(newest)
        note = f"frozen linear probe, {task.folds} folds; pretraining left out {demo.held_out_in_words} alone"
        results[task.title] = {"metric": "accuracy", "value": value, "controls": scores, "note": note}
    return results


if __name__ == "__main__":
    main()
