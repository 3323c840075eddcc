"""The report of a run: curves from its metrics.jsonl, and one HTML file that holds everything and needs no network.

    python training/report.py OUT

writes OUT/figures/ and OUT/report.html anew; `pretrain.py` does the same as the run goes.
"""

import base64
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, StrMethodFormatter

from bridle_hf.common.arguments import ArgumentError
from bridle_hf.monitoring.monitor import PARTS, read_metrics


# Okabe and Ito's colours, told apart by colour-blind readers; the line styles help in print.
LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00", "#999999")
LINE_STYLES = ("-", "--", "-.", ":")
PHASE_COLORS = {"encoder": "#dceaf7", "tokenizer": "#fdebd3", "joint": "#e2f2e4", "alternate": "#eee4f3"}
# Drawing more would cost time and show nothing.
MAX_POINTS = 1000
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


@dataclass(frozen=True)
class Panel:
    """One panel of curves.

    Args:
        lines: Key of the rows to its label, "" where levels alone name the lines.
        percent: Shares are drawn as percent.
        style: A smoothed line over what was logged, what was logged alone, or points joined across phases.
        dashed: Keys whose line is dashed.
    """

    title: str
    unit: str
    lines: dict[str, str]
    percent: bool = False
    logarithmic: bool = False
    style: Literal["smoothed", "raw", "points"] = "smoothed"
    dashed: Sequence[str] = ()


@dataclass(frozen=True)
class Phase:
    """A phase as far as it has been logged: steps from `start` (excluded) to `end`."""

    number: int
    kind: str
    iteration: int
    start: int
    end: int
    rows: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kind if self.kind == "joint" else f"{self.kind} {self.iteration}"


def step_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that tell of optimizer steps, sorted; of rows of one step (a run that was resumed), the last."""
    found = {row["step"]: row for row in rows if "step" in row and "kind" in row and "samples" in row}
    return [found[step] for step in sorted(found)]


def find_phases(rows: Iterable[dict[str, Any]]) -> list[Phase]:
    """The phases in `rows`, in order; each begins where the one before ended."""
    by_number: dict[int, list[dict[str, Any]]] = {}
    for row in step_rows(rows):
        by_number.setdefault(row["phase"], []).append(row)
    phases: list[Phase] = []
    for number, own in sorted(by_number.items()):
        start = phases[-1].end if phases else 0
        phases.append(Phase(number, own[0]["kind"], own[0]["iteration"], start, own[-1]["step"], tuple(own)))
    return phases


# -- curves -----------------------------------------------------------------------------------------------------------


def plot_losses(rows: list[dict[str, Any]], codebook_size: int | None = None) -> Figure:
    """Losses of encoder and tokenizer and the masked accuracy per level over the steps, phases shaded."""
    tokenizer = {"loss": "sum", "cosine_loss": "cosine (estimator to teacher)", "codebook_loss": "codebook"}
    panels = [
        Panel("Encoder: loss on the codes of hidden patches", "cross-entropy (nats)", {"encoder/loss": ""}),
        Panel("Encoder: hidden patches predicted right", "accuracy (%)", {"encoder/accuracy": ""}, percent=True),
        Panel("Tokenizer: losses", "loss", {f"tokenizer/{key}": label for key, label in tokenizer.items()}),
    ]
    figure = _plot(rows, panels, "Losses")
    if codebook_size and figure.axes and any("encoder/loss" in row for row in rows):
        chance = math.log(codebook_size)
        figure.axes[0].axhline(chance, color="black", linestyle=":", label=f"chance: ln {codebook_size}")
        figure.axes[0].legend(fontsize=8, loc="upper right", framealpha=0.9)
    return figure


def plot_usage(rows: list[dict[str, Any]]) -> Figure:
    """Per level: codes used, normalised entropy, quantization error and re-seeded codes over the steps."""
    panels = [
        Panel("Codes used", "of all codes (%)", {"usage/used_fraction": ""}, percent=True),
        Panel(
            "Evenness of their use: entropy", "of the greatest possible (%)", {"usage/normalized_entropy": ""}, True
        ),
        Panel(
            "Quantization error left after each level", "of squared length (%)", {"usage/quantization_error": ""}, True
        ),
        Panel("Dead codes re-seeded since the row before", "codes", {"usage/reseeded": ""}, style="raw"),
    ]
    return _plot(rows, panels, "Use of the codes, by level of the quantizer")


def plot_training(rows: list[dict[str, Any]]) -> Figure:
    """Throughput, MFU, data wait, memory, learning rates and gradient norms over the steps."""
    sides = ("encoder", "tokenizer")
    parts = {f"{side}/grad_norm/{part}": f"{side}: {part}" for side in sides for part in ("layers", *PARTS)}
    panels = [
        Panel("Throughput", "samples/s", {"samples_per_second": ""}),
        Panel("FLOPs of the model (MFU)", "of the peak (%)", {"mfu": ""}, percent=True),
        Panel("Time spent waiting for data", "of a step (%)", {"data_wait_share": ""}, percent=True),
        Panel("Memory of the first process", "GiB", {"memory_gib": ""}, style="raw"),
        Panel("Learning rate", "learning rate", {f"{side}/lr": side for side in sides}, style="raw"),
        Panel(
            "Gradient norm before clipping", "norm", {f"{side}/grad_norm": side for side in sides}, logarithmic=True
        ),
        Panel("Gradient norm by part of the model", "norm", parts, logarithmic=True),
    ]
    return _plot(rows, panels, "Speed and optimization")


def plot_probes(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy of frozen probes over the steps; what is not the trained encoder's (the controls) is dashed."""
    keys = sorted({key for row in rows for key, value in row.items() if key.startswith("probe/") and _finite(value)})
    controls = [key for key in keys if key.removeprefix("probe/") not in ("linear", "knn")]
    keys.sort(key=controls.__contains__)
    names = {key: key.removeprefix("probe/").replace("_", " ") for key in keys}
    names |= {key: f"encoder {name}" for key, name in names.items() if key not in controls}
    panel = Panel("Frozen features", "accuracy (%)", names, percent=True, style="points", dashed=controls)
    return _plot(rows, [panel], "Probes")


def _plot(rows: list[dict[str, Any]], panels: Sequence[Panel], title: str) -> Figure:
    """The panels that have something to show, one above the other over the same steps."""
    phases = find_phases(rows)
    panels = [panel for panel in panels if any(_curves(rows, key) for key in panel.lines)]
    figure = Figure(figsize=(8, 0.9 + 2.2 * max(len(panels), 1)), dpi=110, layout="constrained")
    figure.suptitle(title)
    if not panels:
        figure.text(0.5, 0.4, "nothing logged yet", ha="center")
        return figure
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels):
        _draw_panel(ax, panel, rows, phases)
        _shade(ax, phases, with_names=ax is axes[0])
    kinds = dict.fromkeys(phase.kind for phase in phases)
    handles = [Patch(facecolor=PHASE_COLORS[kind], edgecolor="grey", label=f"{kind} phase") for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    axes[-1].set_xlabel("optimizer step")
    return figure


def _draw_panel(ax: Axes, panel: Panel, rows: list[dict[str, Any]], phases: Sequence[Phase]) -> None:
    curves = [(key, label, curve) for key, label in panel.lines.items() for curve in _curves(rows, key).items()]
    for number, (key, label, (level, (steps, values))) in enumerate(curves):
        style = LINE_STYLES[number % len(LINE_STYLES)]
        if panel.dashed:
            style = "--" if key in panel.dashed else "-"
        line = {"color": LINE_COLORS[number % len(LINE_COLORS)], "linestyle": style, "linewidth": 1.7}
        line["label"] = label or level or None
        if panel.style == "points":
            ax.plot(steps, 100 * values, marker="o", markersize=4, clip_on=False, **line)
        else:
            _draw_curve(ax, steps, values * (100 if panel.percent else 1), phases, panel.style == "smoothed", line)
    ax.set_title(panel.title, fontsize=10, loc="left", pad=16 if ax.get_subplotspec().is_first_row() else 6)
    ax.set_ylabel(panel.unit, fontsize=9)
    ax.tick_params(labelsize=9)
    ax.grid(alpha=0.25)
    if panel.logarithmic:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        ax.tick_params(which="minor", labelsize=9)
    if len(curves) > 1:
        # Long enough for a dashed line to be seen as one, markers or not.
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handlelength=3.5)


def _draw_curve(
    ax: Axes, steps: np.ndarray, values: np.ndarray, phases: Sequence[Phase], smoothed: bool, line: dict[str, Any]
) -> None:
    """One line, broken where a phase ends; if `smoothed`, thick over a thin one as logged."""
    for phase in phases:
        inside = (steps > phase.start) & (steps <= phase.end)
        own = values[inside]
        if not inside.any():
            continue
        if smoothed:
            ax.plot(steps[inside], own, color=line["color"], alpha=0.3, linewidth=0.8)
            own = _smooth(own)
        # A line of one point would not be seen.
        ax.plot(steps[inside], own, marker="o" if len(own) == 1 else None, markersize=4, **line)
        line = line | {"label": None}


def _shade(ax: Axes, phases: Sequence[Phase], with_names: bool) -> None:
    """Shade each phase in the colour of its kind; the names of those wide enough stand above the panel."""
    for phase in phases:
        ax.axvspan(phase.start, phase.end, color=PHASE_COLORS[phase.kind], linewidth=0, zorder=0)
        ax.axvline(phase.end, color="grey", linewidth=0.6, zorder=1)
        if with_names and phase.end - phase.start > 0.09 * phases[-1].end:
            middle = (phase.start + phase.end) / 2
            ax.text(
                middle, 1.02, phase.name, transform=ax.get_xaxis_transform(), ha="center", fontsize=8, color="#444444"
            )
    if phases:
        ax.set_xlim(0, phases[-1].end)


def _curves(rows: Iterable[dict[str, Any]], key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The curves of a key, by level ("" where it has none): steps and finite values, thinned out to `MAX_POINTS`."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        value = row.get(key) if "step" in row else None
        levels = [f"level {number + 1}" for number in range(len(value))] if isinstance(value, list) else [""]
        for level, entry in zip(levels, value if isinstance(value, list) else [value]):
            if _finite(entry):
                points.setdefault(level, {})[row["step"]] = entry
    curves = {}
    for level, found in points.items():
        steps, values = np.array(sorted(found.items())[:: math.ceil(len(found) / MAX_POINTS)]).T
        curves[level] = steps, values
    return curves


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a thirtieth of the values, without bias at the start."""
    keep = 1 - 1 / max(1.0, len(values) / 30)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + value, keep * weight + 1
        smoothed.append(average / weight)
    return np.array(smoothed)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# -- the report -------------------------------------------------------------------------------------------------------


def write_report(out_dir: str | os.PathLike) -> Path:
    """Draw the curves of a run into OUT/figures/ and write OUT/report.html; a reader never sees half a file.

    Reads metrics.jsonl, run.json, skipped.jsonl, results.json and figures/*.png of `out_dir`, as far as they exist.

    Returns:
        The path of the report.
    """
    out = Path(out_dir)
    rows, run = read_metrics(out / "metrics.jsonl"), _read_json(out / "run.json") or {}
    _write_curves(out / "figures", rows, run)
    results = _read_json(out / "results.json") or []
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
        figures=list(_figures(out / "figures")),
        skipped=[(str(row.get("path", row)), str(row.get("reason", ""))) for row in skipped[:MAX_SKIPPED_SHOWN]],
        num_skipped=len(skipped),
        settings=_settings(run),
    )
    _write_atomically(out / "report.html", page.encode("utf-8"))
    return out / "report.html"


def _write_curves(folder: Path, rows: list[dict[str, Any]], run: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    codebook_size = ((run.get("arguments") or {}).get("encoder") or {}).get("codebook_size")
    figures = {"losses": plot_losses(rows, codebook_size), "usage": plot_usage(rows), "training": plot_training(rows)}
    if any(key.startswith("probe/") for row in rows for key in row):
        figures["probes"] = plot_probes(rows)
    for name, figure in figures.items():
        temporary = folder / f".{name}.tmp"
        figure.savefig(temporary, format="png")
        os.replace(temporary, folder / f"{name}.png")


def _figures(folder: Path) -> Iterable[dict[str, str]]:
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
        text += f" on {run['data']}" + (f" ({run['samples']:,} items)" if _finite(run.get("samples")) else "")
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


def _phase_table(phases: Sequence[Phase], run: dict[str, Any]) -> dict[str, Any]:
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
            steps += f" of {planned[phase.number]['steps']:,}"
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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").exists():
        raise ArgumentError("report.py takes one argument: the output folder of a run, which holds a metrics.jsonl")
    print(write_report(sys.argv[1]))


if __name__ == "__main__":
    main()
