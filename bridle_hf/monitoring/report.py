"""Report of a run: curves from its metrics.jsonl, and one HTML file that holds everything and needs no network.

    bridle report OUT

writes OUT/figures/ and OUT/report.html anew; pretraining does the same as the run goes.
"""

import base64
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bridle_hf.common.files import read_json, write_bytes, write_figure
from bridle_hf.monitoring.curves import (
    LoggedPhase,
    _finite,
    find_phases,
    plot_losses,
    plot_probes,
    plot_training,
    plot_usage,
    step_rows,
)
from bridle_hf.monitoring.metrics_log import read_metrics


MAX_SKIPPED_SHOWN = 50
# How many of the last rows of a phase its "final" numbers are the mean of.
FINAL_ROWS = 5

# What to see in a figure, by the start of its file name; the order is that of the report.
CAPTIONS = {
    "losses": "Losses and masked accuracy over the optimizer steps; phases are shaded. Thin: as logged; thick: "
    "smoothed within the phase. Encoder losses of two iterations have different targets: do not compare their height.",
    "usage": "How well each level of the quantizer uses its codes, over the stretch of steps between two logged rows. "
    "Used codes and entropy near 100% are good; in encoder phases they are those of the targets. The quantization "
    "error should fall from level to level: what is left of the latents, as a share of their squared length.",
    "training": "Speed, share of the peak (settings: peak), waiting for data, memory, learning rate, gradient norm. A "
    "large share of waiting says that the loader, not the model, sets the pace.",
    "probes": "Accuracy of classifiers on frozen features as the run goes. Dashed lines are the controls to beat.",
    "masked_input": "One input, and the patches that the encoder sees of it; it predicts codes for the hatched ones.",
    "codes": "The codes that the tokenizer gives each patch, level by level. Within a panel one colour is one code; "
    "colours of different levels are unrelated. Sounds or shapes that repeat should repeat their level-1 code.",
    "predictions": "Codes that the encoder predicted for hidden patches beside the true ones, and accuracy per level "
    "against two ways to guess.",
}


# --- The report ---


def write_report(out_dir: str | os.PathLike) -> Path:
    """Draw the curves of a run into OUT/figures/ and write OUT/report.html; a reader never sees half a file.

    Reads metrics.jsonl, run.json, skipped.jsonl, results.json and figures/*.png of `out_dir`, as far as they exist.

    Returns:
        The path of the report.
    """
    out = Path(out_dir)
    rows, run = read_metrics(out / "metrics.jsonl"), read_json(out / "run.json") or {}
    _write_curves(out / "figures", rows, run)
    results = read_json(out / "results.json") or []
    skipped = read_metrics(out / "skipped.jsonl")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report_template.html").render(
        title=out.resolve().name,
        summary=_summary(run, rows),
        results=[_cells(table) for table in (results if isinstance(results, list) else [results])],
        phases=_phase_table(find_phases(rows), run),
        figures=list(_pictures(out / "figures")),
        skipped=[(str(row.get("path", row)), str(row.get("reason", ""))) for row in skipped[:MAX_SKIPPED_SHOWN]],
        num_skipped=len(skipped),
        settings=_settings(run),
    )
    write_bytes(out / "report.html", page.encode("utf-8"))
    return out / "report.html"


def _write_curves(folder: Path, rows: list[dict[str, Any]], run: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    codebook_size = ((run.get("arguments") or {}).get("encoder") or {}).get("codebook_size")
    figures = {"losses": plot_losses(rows, codebook_size), "usage": plot_usage(rows), "training": plot_training(rows)}
    if any(key.startswith("probe/") for row in rows for key in row):
        figures["probes"] = plot_probes(rows)
    for name, figure in figures.items():
        write_figure(folder / f"{name}.png", figure)


def _pictures(folder: Path) -> Iterable[dict[str, str]]:
    """Name, caption and data URI of every complete PNG of `folder`, in the order of `CAPTIONS`."""
    kinds = list(CAPTIONS)
    found = []
    for path in folder.glob("*.png"):
        kind = next((kind for kind in kinds if path.stem.startswith(kind)), None)
        found.append((kinds.index(kind) if kind else len(kinds), path.stem, CAPTIONS.get(kind, ""), path))
    for _, stem, caption, path in sorted(found):
        data = path.read_bytes()
        # A process that was killed may have left a picture half written.
        if b"IEND" in data[-12:]:
            uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
            yield {"name": stem.replace("_", " "), "caption": caption, "uri": uri}


def _summary(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What was trained, on what, how far and how fast, in one paragraph."""
    modality = run.get("modality", "")
    text = f"A BRIDLE {modality} encoder and its tokenizer, trained in turns".replace("  ", " ")
    if "data" in run:
        text += f" on {run['data']}" + (f" ({run['samples']:,} samples)" if _finite(run.get("samples")) else "")
    rows = step_rows(rows)
    if not rows:
        return text + ". Nothing has been logged yet."
    last, planned = rows[-1], sum(phase["steps"] for phase in run.get("phases", []))
    seconds = _training_seconds(rows)
    text += f". {last['step']:,} " + (f"of {planned:,} " if planned else "") + "optimizer steps done"
    text += f", {last['samples']:,} samples in {_duration(seconds)} of training"
    text += f" ({last['samples'] / max(seconds, 1e-9):,.0f} samples/s"
    text += f"; {np.mean([row.get('data_wait_share', 0.0) for row in rows]):.1%} of it waiting for data)."
    if last.get("skipped_steps"):
        text += f" {last['skipped_steps']} steps were skipped because loss or gradient was not finite."
    return text


def _training_seconds(rows: Sequence[dict[str, Any]]) -> float:
    """Time spent in steps: `time` starts anew when a run is resumed, samples and their rate do not."""
    samples = np.diff([0, *(row["samples"] for row in rows)])
    return float(sum(samples / [max(row.get("samples_per_second", 0.0), 1e-9) for row in rows]))


def _phase_table(phases: Sequence[LoggedPhase], run: dict[str, Any]) -> dict[str, Any]:
    """One row per phase; the last columns are means over the phase's last `FINAL_ROWS` logged rows."""
    keys = {
        "encoder loss": "encoder/loss",
        "masked accuracy by level (%)": "encoder/accuracy",
        "tokenizer loss": "tokenizer/loss",
        "codes used by level (%)": "usage/used_fraction",
        "entropy by level (%)": "usage/normalized_entropy",
    }
    planned = run.get("phases", [])
    table = []
    for phase in phases:
        steps = f"{phase.end - phase.start:,}"
        if phase.number < len(planned):
            own = planned[phase.number]
            steps += f" of {own.get('full_steps', own['steps']):,}"
        finals = [_final(phase.rows, key) for key in keys.values()]
        table.append([str(phase.number), phase.kind, str(phase.iteration), steps, *finals])
    return {"columns": ["phase", "trains", "iteration", "steps", *keys], "rows": table}


def _final(rows: Sequence[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None][-FINAL_ROWS:]
    if not values:
        return "-"
    mean = np.mean(np.array(values, dtype=float), axis=0)
    return f"{mean:.4g}" if mean.ndim == 0 else " / ".join(f"{100 * share:.3g}" for share in mean)


def _cells(table: dict[str, Any]) -> dict[str, Any]:
    """A table of results.json with its cells as text."""
    rows = [[f"{cell:.3f}" if isinstance(cell, float) else "-" if cell is None else str(cell) for cell in row]
            for row in table.get("rows", [])]  # fmt: skip
    return {"title": "Results", "columns": [], "notes": [], **table, "rows": rows}


def _settings(run: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """run.json as tables of dotted names: the loose values first, then one table per group."""
    groups: dict[str, list[tuple[str, str]]] = {"run": []}
    for name, value in run.items():
        if isinstance(value, dict):
            groups[name] = list(_flatten(value))
        elif isinstance(value, list):
            groups["run"] += _flatten({f"{name}[{number}]": json.dumps(entry) for number, entry in enumerate(value)})
        else:
            groups["run"] += _flatten({name: value})
    return [(name, rows) for name, rows in groups.items() if rows]


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.1f} min" if hours < 2 else f"{hours:.1f} h"
