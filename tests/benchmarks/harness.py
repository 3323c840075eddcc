"""
What every benchmark does alike: contenders take their turns within one run, so that a busy machine slows all of them,
and what counts is the time of the CPU, without that spent waiting for one; a row is ours against one peer, with the
median of the rounds' ratios and their quartiles.

A benchmark is a file with `ROWS`, functions that yield rows, and ends with `run(__doc__, ROWS)`; `python
tests/benchmarks` runs those that make one table.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True)
class Row:
    """Ours against a peer.

    Args:
        what: What is measured, and of which size.
        peer_name: Who the peer is, and how it is called.
        ours, peer: Medians, in `unit`.
        ratio: How many times better ours is: the median over rounds.
        spread: Quartiles of the ratio.
        command: What makes this row again.
    """

    what: str
    peer_name: str
    ours: float
    peer: float
    unit: str
    ratio: float
    spread: tuple[float, float]
    command: str


def race(what: str, ours: Callable, peers: dict[str, Callable], rounds: int, scale: float = 1.0) -> Iterable[Row]:
    """A row for each peer: milliseconds of CPU time of a call, in turns; each is called once before, to warm up.

    Args:
        scale: How many of what the unit is per a call makes (clips, views): times are divided by it.
    """
    contenders = {"ours": ours, **peers}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contend in contenders.values():
        contend()
    for number in range(rounds):
        # Who comes first changes from round to round.
        names = list(contenders)[:: 1 if number % 2 else -1]
        for name in names:
            began = time.process_time()
            contenders[name]()
            times[name].append(1e3 * (time.process_time() - began) / scale)
    for name in peers:
        yield row(what, name, times["ours"], times[name], "ms")


def row(what: str, peer_name: str, ours: list[float], peer: list[float], unit: str) -> Row:
    """Of values of which less is better, round by round."""
    ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    medians = statistics.median(ours), statistics.median(peer)
    command = f"python tests/benchmarks/{Path(sys.argv[0]).name}"
    return Row(what, peer_name, *medians, unit, statistics.median(ratios), (low, high), command)


def table(rows: Iterable[Row]) -> str:
    """Rows as a table of Markdown."""
    lines = ["| what | ours | peer | | ratio | quartiles | command |", "|---|---|---|---|---|---|---|"]
    for entry in rows:
        ours, peer = (f"{_shortened(value)} {entry.unit}" for value in (entry.ours, entry.peer))
        spread = " to ".join(f"{value:.2f}" for value in entry.spread)
        cells = (entry.what, ours, peer, entry.peer_name, f"{entry.ratio:.2f}", spread, f"`{entry.command}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shortened(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def run(doc: str, sections: Iterable[Callable[[int], Iterable[Row]]], rounds: int = 15, threads: int = 1) -> None:
    """The command line of a benchmark: a table on the screen, and `--json FILE`.

    Args:
        sections: Each yields rows, for a number of rounds.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [entry for section in sections for entry in section(options.rounds)]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(entry) for entry in rows], indent=1), encoding="utf-8")
