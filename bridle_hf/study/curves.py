"""Learning curves of a study: accuracy against the CPU time of pretraining, as a table and as a picture.

A point is an arm at an iteration; its time is that of all phases up to there. CPU seconds of the one thread of a run,
the loading of its data included: the clock on the wall tells what else the machine was doing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bridle_hf.common.files import write_figure
from bridle_hf.probing.readouts import PRIMARY
from bridle_hf.study.results import Scores
from bridle_hf.study.statistics import with_deviation


Curves = Mapping[str, Sequence[str]]


def points(sources: Mapping[str, Scores], curve: Sequence[str]) -> dict[str, dict[int, tuple[float, float]]]:
    """Of each point of a curve that has been run, by seed: CPU seconds and accuracy in percent."""
    found = {}
    for name in curve:
        scores = sources.get(name)
        by_seed = {
            seed: (scores.cpu_seconds[seed], 100 * readouts[PRIMARY.name]["score"])
            for seed, readouts in (scores.by_seed if scores else {}).items()
            if seed in scores.cpu_seconds and PRIMARY.name in readouts
        }
        if by_seed:
            found[name] = by_seed
    return found


def table_of_curves(scores: Mapping[str, Mapping[str, Mapping[str, Scores]]], curves: Curves) -> str:
    """Markdown: one row per set, task and point: mean time and accuracy, and both against the last point of the first
    curve, over the seeds that both have."""
    first = next(iter(curves))
    lines = [f"| set, task | curve | point | seeds | CPU minutes | accuracy | time, of the longest {first} | "
             "accuracy, less its |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for set_name, tasks in scores.items():
        for task, sources in tasks.items():
            last = points(sources, curves[first][-1:]).get(curves[first][-1], {})
            for curve, names in curves.items():
                for name, by_seed in points(sources, names).items():
                    times, accuracies = zip(*by_seed.values())
                    lines.append(
                        f"| {set_name}, {task} | {curve} | {name} | {len(by_seed)} | {np.mean(times) / 60:.1f} | "
                        f"{with_deviation(accuracies)} | {_against(by_seed, last)} |"
                    )
    return "\n".join(lines)


def _against(by_seed: Mapping[int, tuple[float, float]], last: Mapping[int, tuple[float, float]]) -> str:
    """Two cells: the share of the time, and the difference in accuracy, seed by seed; empty without a common seed."""
    pairs = [(by_seed[seed], last[seed]) for seed in by_seed if seed in last]
    if not pairs or by_seed == last:
        return " | "
    share = np.mean([ours[0] / theirs[0] for ours, theirs in pairs])
    return f"{share:.2f} | {with_deviation([ours[1] - theirs[1] for ours, theirs in pairs], '+.1f')}"


def draw_curves(path: Path, scores: Mapping[str, Mapping[str, Mapping[str, Scores]]], curves: Curves) -> None:
    """A panel per set and task that has a curve of two points: a dot per seed, a line through the means."""
    from matplotlib.figure import Figure

    panels = []
    for set_name, tasks in scores.items():
        for task, sources in tasks.items():
            found = {curve: points(sources, names) for curve, names in curves.items()}
            if any(len(of_curve) > 1 for of_curve in found.values()):
                panels.append((f"{set_name}: {task}", found))
    if not panels:
        return
    figure = Figure(figsize=(4.4 * len(panels), 3.4), dpi=110, layout="constrained")
    for ax, (title, found) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        for number, (curve, of_curve) in enumerate(found.items()):
            for by_seed in of_curve.values():
                times, accuracies = zip(*by_seed.values())
                ax.plot(np.array(times) / 60, accuracies, "o", color=f"C{number}", alpha=0.5)
            means = sorted(tuple(np.mean(list(by_seed.values()), axis=0)) for by_seed in of_curve.values())
            ax.plot([time / 60 for time, _ in means], [mean for _, mean in means], color=f"C{number}", label=curve)
        ax.set(title=title, xlabel="pretraining (CPU minutes)", ylabel="accuracy (%)", xscale="log")
        ax.grid(alpha=0.3, which="both")
        ax.legend()
    write_figure(path, figure)
