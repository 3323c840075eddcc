"""Curves of a run: losses, code usage, training and probes over the steps, as pictures."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, StrMethodFormatter

from bridle_hf.modeling_bridle import PARTS


# Okabe and Ito's colours, told apart by colour-blind readers; the line styles help in print.
LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00", "#999999")


LINE_STYLES = ("-", "--", "-.", ":")


PHASE_COLORS = {"encoder": "#dceaf7", "tokenizer": "#fdebd3", "joint": "#e2f2e4", "alternate": "#eee4f3"}


# Drawing more would cost time and show nothing.
MAX_POINTS = 1000


@dataclass(frozen=True)
class Panel:
    """One panel of curves.

    Args:
        lines: key of the rows to its label, "" where levels alone name the lines.
        percent: shares are drawn as percent.
        style: a smoothed line over what was logged, what was logged alone, or points joined across phases.
        dashed: keys whose line is dashed.
    """

    title: str
    unit: str
    lines: dict[str, str]
    percent: bool = False
    logarithmic: bool = False
    style: Literal["smoothed", "raw", "points"] = "smoothed"
    dashed: Sequence[str] = ()


@dataclass(frozen=True)
class LoggedPhase:
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


def find_phases(rows: Iterable[dict[str, Any]]) -> list[LoggedPhase]:
    """The phases in `rows`, in order; each begins where the one before ended."""
    by_number: dict[int, list[dict[str, Any]]] = {}
    for row in step_rows(rows):
        by_number.setdefault(row["phase"], []).append(row)
    phases: list[LoggedPhase] = []
    for number, own in sorted(by_number.items()):
        start = phases[-1].end if phases else 0
        phases.append(LoggedPhase(number, own[0]["kind"], own[0]["iteration"], start, own[-1]["step"], tuple(own)))
    return phases


def plot_losses(rows: list[dict[str, Any]], codebook_size: int | None = None) -> Figure:
    """Losses of encoder and tokenizer and the masked accuracy per level over the steps, phases shaded."""
    tokenizer = {"loss": "sum", "cosine_loss": "cosine (estimator to teacher)", "codebook_loss": "codebook"}
    panels = [
        Panel("Encoder: loss on hidden patches", "cross-entropy (nats)", {"encoder/loss": ""}),
        Panel("Encoder: hidden patches predicted right", "accuracy (%)", {"encoder/accuracy": ""}, percent=True),
        Panel("Tokenizer: losses", "loss", {f"tokenizer/{key}": label for key, label in tokenizer.items()}),
    ]
    figure = _plot(rows, panels, "Losses")
    if codebook_size and figure.axes and any("encoder/accuracy" in row for row in rows):
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
    parts = {f"{side}/grad_norm/{part}": f"{side}: {part}" for side in sides for part in PARTS}
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


def _draw_panel(ax: Axes, panel: Panel, rows: list[dict[str, Any]], phases: Sequence[LoggedPhase]) -> None:
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
    ax: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    phases: Sequence[LoggedPhase],
    smoothed: bool,
    line: dict[str, Any],
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


def _shade(ax: Axes, phases: Sequence[LoggedPhase], with_names: bool) -> None:
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
