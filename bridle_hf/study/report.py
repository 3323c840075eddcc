"""Report of a study: tables of scores, paired differences with their intervals, pictures; from results.jsonl alone."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridle_hf.common.errors import ArgumentError
from bridle_hf.common.files import write_figure, write_text
from bridle_hf.probing.readouts import ON_REQUEST, PRIMARY, READOUTS
from bridle_hf.study.arguments import StudyArguments
from bridle_hf.study.curves import draw_curves, table_of_curves
from bridle_hf.study.grid import Comparison, RunSpec, read_comparisons, read_curves, read_grid
from bridle_hf.study.results import Scores, gather, read_results
from bridle_hf.study.statistics import Difference, holm, paired_difference, verdict, with_deviation


# A difference of less, in accuracy, is none worth having.
MARGIN = 0.01


def write_report(args: StudyArguments) -> Path:
    """`report.md` and `figures/*.png` in the folder of a study; parts of `args.page`, if given. Returns the report.

    Raises:
        ArgumentError: there are no results.
    """
    out = Path(args.output_dir)
    rows = [row for row in read_results(out) if row["status"] == "done"]
    if not rows:
        raise ArgumentError(f"{out} holds no results of a study")
    comparisons, curves = read_comparisons(args.grid), read_curves(args.grid)
    scores = gather([row for row in rows if not row.get("finetune")], out)
    tuned = gather([row for row in rows if row.get("finetune")], out)
    compared = compare(scores, comparisons, [PRIMARY.name])
    compared_tuned = compare(tuned, comparisons, shares_of(tuned))
    parts = {"runs": progress(read_grid(args.grid), read_results(out))}
    parts |= {f"scores of {name}": table_of_scores(name, scores[name]) for name in scores}
    if tuned:
        parts["few labels"] = table_of_few_labels(tuned)
    if curves:
        parts["learning curves"] = table_of_curves(scores, curves)
    parts["differences"] = table_of_differences([*compared, *compared_tuned])
    text = "\n".join(f"## {title}\n\n{body}\n" for title, body in parts.items())
    write_text(out / "report.md", text)
    draw(out / "figures", scores, [*compared, *compared_tuned])
    if tuned:
        draw_few_labels(out / "figures" / "few_labels.png", tuned)
    if curves:
        draw_curves(out / "figures" / "learning_curves.png", scores, curves)
    if args.page:
        fill(Path(args.page), {f"{Path(args.grid).stem}: {title}": body for title, body in parts.items()})
    return out / "report.md"


def progress(specs: Sequence[RunSpec], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: how many runs of a grid are done, and, while some are not, the seeds of each arm on each set."""
    status = {row["hash"]: row["status"] for row in rows}
    done, failed = ({spec.hash for spec in specs if status.get(spec.hash) == name} for name in ("done", "failed"))
    text = f"{len(done)} of {len(specs)} runs are done" + (f", {len(failed)} failed." if failed else ".")
    if len(done) == len(specs):
        return text
    sets = list(dict.fromkeys(spec.set for spec in specs))
    lines = [f"{text} Seeds that are done, of those asked for:", "", f"| | {' | '.join(sets)} |",
             f"|---|{'---|' * len(sets)}"]  # fmt: skip
    for arm in dict.fromkeys(spec.arm for spec in specs):
        asked = [[spec for spec in specs if (spec.arm, spec.set) == (arm, name)] for name in sets]
        counts = [
            f"{sum(spec.hash in done for spec in of_set)} of {len(of_set)}" if of_set else "" for of_set in asked
        ]
        lines.append(f"| {arm} | {' | '.join(counts)} |")
    return "\n".join(lines)


def compare(
    scores: Mapping[str, Mapping[str, Mapping[str, Scores]]],
    comparisons: Sequence[Comparison],
    readouts: Sequence[str],
) -> list[dict[str, Any]]:
    """Each comparison under each read-out on each set and task that has both: difference, adjusted p (over the sets),
    verdict."""
    rows = []
    for comparison, readout in itertools.product(comparisons, readouts):
        of_sets = []
        for set_name, tasks in scores.items():
            for number, (task, sources) in enumerate(tasks.items()):
                if comparison.first in sources and comparison.second in sources:
                    difference = _difference(sources[comparison.first], sources[comparison.second], readout)
                    if difference is not None:
                        where = ", ".join([set_name, task, *([] if readout == PRIMARY.name else [readout])])
                        of_sets.append({"comparison": comparison, "set": set_name, "where": where,
                                        "main": number == 0, "difference": difference})  # fmt: skip
        # The first task of a set is the one that counts; the others are told beside it.
        adjusted = holm({row["set"]: row["difference"].p for row in of_sets if row["main"]})
        for row in of_sets:
            row["p"] = adjusted[row["set"]] if row["main"] else None
            row["verdict"] = verdict(row["difference"], MARGIN, row["p"])
        rows += of_sets
    return rows


def _difference(first: Scores, second: Scores, readout: str) -> Difference | None:
    """`None` where they have no seed in common, or are of different samples."""
    seeds = [seed for seed in first.by_seed if second.seedless or seed in second.by_seed]
    if not seeds or first.items != second.items:
        return None
    return paired_difference(first.correct(seeds, readout), second.correct(seeds, readout), first.clusters)


def table_of_scores(set_name: str, tasks: Mapping[str, Mapping[str, Scores]]) -> str:
    """Markdown: sources down, tasks and read-outs across; mean over seeds in percent, and the spread of the first."""
    present = {name for sources in tasks.values() for found in sources.values() for row in found.by_seed.values()
               for name in row}  # fmt: skip
    names = [readout.name for readout in READOUTS]
    names += [readout.name for readout in ON_REQUEST.values() if readout.name in present - {*names}]
    lines = []
    for task, sources in tasks.items():
        lines += [f"**{set_name}, {task}** ({len(next(iter(sources.values())).clusters)} samples)", ""]
        lines += [f"| | seeds | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
        for source, found in sorted(sources.items(), key=lambda pair: _order(pair[0])):
            if not any(found.of(name) for name in names):  # a regression on the input as a whole, or the majority
                values = [f"{100 * row['score']:.1f} ({name})" if name else f"{100 * row['score']:.1f}"
                          for name, row in next(iter(found.by_seed.values())).items()]  # fmt: skip
                lines.append(f"| {source} | | {', '.join(values)} |{' |' * (len(names) - 1)}")
                continue
            cells = [_cell(found.of(name), spread=name == PRIMARY.name) for name in names]
            lines.append(f"| {source} | {'' if found.seedless else len(found.by_seed)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: list[float], spread: bool) -> str:
    if not values:
        return ""
    return with_deviation(values) if spread else f"{np.mean(values):.1f}"


def _order(source: str) -> tuple[int, str]:
    return (0 if source == "majority" else 1 if "@" not in source else 2, source)


def shares_of(tuned: Mapping[str, Mapping[str, Mapping[str, Scores]]]) -> list[str]:
    """Of the labels, that encoders were fine-tuned on, the smallest first."""
    found = {
        share
        for tasks in tuned.values()
        for sources in tasks.values()
        for scores in sources.values()
        for shares in scores.by_seed.values()
        for share in shares
    }
    return sorted(found, key=_percent)


def _percent(share: str) -> float:
    return float(share.removesuffix("%"))


def table_of_few_labels(tuned: Mapping[str, Mapping[str, Mapping[str, Scores]]]) -> str:
    """Markdown: sources down, shares of the labels across; mean over seeds in percent, its spread, and how many labels
    there were."""
    shares = shares_of(tuned)
    lines = [f"| fine-tuned | seeds | {' | '.join(shares)} |", f"|---|---|{'---|' * len(shares)}"]
    for set_name, tasks in tuned.items():
        for task, sources in tasks.items():
            for source, found in sorted(sources.items()):
                counts = {share: entry["labels"] for row in found.by_seed.values() for share, entry in row.items()}
                cells = [
                    f"{_cell(found.of(share), spread=True)} ({counts[share]})" if share in counts else ""
                    for share in shares
                ]
                lines.append(f"| {source}: {set_name}, {task} | {len(found.by_seed)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_differences(compared: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row per comparison, set and task; points of the primary read-out."""
    lines = ["| comparison | set, task | seeds | difference | 95% interval | seeds above 0 | p (Holm) | verdict |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in compared:
        difference, comparison = row["difference"], row["comparison"]
        p = "" if row["p"] is None else f"{row['p']:.4f}"
        above = sum(value > 0 for value in difference.per_seed)
        lines.append(
            f"| {comparison.first} - {comparison.second} | {row['where']} | {len(difference.per_seed)} | "
            f"{100 * difference.mean:+.1f} | {100 * difference.low:+.1f} to {100 * difference.high:+.1f} | "
            f"{above} | {p} | {row['verdict']} |"
        )
    return "\n".join(lines)


def draw(folder: Path, scores: Mapping[str, Mapping[str, Mapping[str, Scores]]], compared: Sequence[dict]) -> None:
    """`scores_SET.png`, a dot per seed under the primary read-out; `differences.png`, means with their intervals."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for set_name, tasks in scores.items():
        sources = sorted({source for found in tasks.values() for source in found}, key=_order, reverse=True)
        figure = Figure(figsize=(5 * len(tasks), 0.8 + 0.3 * len(sources)), dpi=110, layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(tasks), sharey=True))
        for ax, (task, found) in zip(axes, tasks.items()):
            for place, source in enumerate(sources):
                values = found[source].of(PRIMARY.name) if source in found else []
                colour = "tab:blue" if "@" in source else "tab:gray"
                ax.plot(values, [place] * len(values), "o", color=colour, alpha=0.6)
                if values:
                    ax.plot(np.mean(values), place, "|", color="black", markersize=14)
            ax.set(title=f"{set_name}: {task}", xlabel=f"accuracy (%), {PRIMARY.name}")
            ax.set_yticks(range(len(sources)), sources)
            ax.grid(axis="x", alpha=0.3)
        write_figure(folder / f"scores_{set_name}.png", figure)
    if not compared:
        return
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(compared)), dpi=110, layout="constrained")
    ax = figure.subplots()
    colours = {"above": "tab:green", "below": "tab:red", "equal": "tab:blue", "open": "tab:gray",
               "one seed": "silver"}  # fmt: skip
    for place, row in enumerate(reversed(compared)):
        difference = row["difference"]
        ends = [[100 * (difference.mean - difference.low)], [100 * (difference.high - difference.mean)]]
        ax.errorbar(100 * difference.mean, place, xerr=ends, fmt="o", color=colours[row["verdict"]], capsize=3)
    labels = [f"{row['comparison'].first} - {row['comparison'].second}: {row['where']}" for row in compared]
    ax.set_yticks(range(len(labels)), labels[::-1])
    ax.axvline(0, color="black", linewidth=0.8)
    ax.axvspan(-100 * MARGIN, 100 * MARGIN, color="black", alpha=0.08)
    ax.set(xlabel="difference (points)\n95% interval over seeds and clusters\nshaded: the margin")
    ax.grid(axis="x", alpha=0.3)
    write_figure(folder / "differences.png", figure)


def draw_few_labels(path: Path, tuned: Mapping[str, Mapping[str, Mapping[str, Scores]]]) -> None:
    """Accuracy against the share of the labels, a line per source with a dot per seed, a panel per set and task."""
    from matplotlib.figure import Figure

    panels = [(set_name, task, sources) for set_name, tasks in tuned.items() for task, sources in tasks.items()]
    figure = Figure(figsize=(4 * len(panels), 3.2), dpi=110, layout="constrained")
    for ax, (set_name, task, sources) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        for number, (source, found) in enumerate(sorted(sources.items())):
            shares = sorted({share for row in found.by_seed.values() for share in row}, key=_percent)
            for share in shares:
                values = found.of(share)
                ax.plot([_percent(share)] * len(values), values, "o", color=f"C{number}", alpha=0.5)
            means = [np.mean(found.of(share)) for share in shares]
            ax.plot([_percent(share) for share in shares], means, color=f"C{number}", label=source)
        ax.set(title=f"{set_name}: {task}", xlabel="labels (%)", ylabel="accuracy (%), fine-tuned", xscale="log")
        ax.grid(alpha=0.3)
        ax.legend()
    write_figure(path, figure)


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Put each part between `<!-- NAME -->` and `<!-- end -->` of a page.

    Raises:
        ArgumentError: the page is not there, or has no mark for any part.
    """
    if not page.is_file():
        raise ArgumentError(f"--page {page}: No such file")
    text, filled = page.read_text(encoding="utf-8"), 0
    for name, body in parts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, body=body: f"{match[1]}\n{body}\n\n{match[2]}", text)
        filled += count
    if not filled:
        raise ArgumentError(f"--page {page}: no mark as <!-- {next(iter(parts))} --> is in it")
    write_text(page, text)
