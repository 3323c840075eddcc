"""
Data sets found: 100,000 files in 100 class folders against `os.walk`, alone and with the paths that it does not make;
a metadata.csv of a million rows against `csv.reader`. Theirs are no samples yet: no labels, splits, checks, nor order.
"""

import csv
import os
import tempfile
from pathlib import Path

from harness import race, run

from bridle_hf.data.finding import find_samples


FILES, ROWS = 100_000, 1_000_000


def files(rounds):
    with tempfile.TemporaryDirectory() as data:
        for number in range(FILES):
            path = Path(data, f"class_{number % 100:02d}", f"clip_{number:06d}.wav")
            path.parent.mkdir(exist_ok=True)
            path.touch()

        def walk():
            return sum(len(names) for _, _, names in os.walk(data))

        def walk_with_paths():
            return [os.path.join(place, name) for place, _, names in os.walk(data) for name in names]

        def ours():
            return find_samples(data, "audio")

        assert walk() == FILES and sorted(walk_with_paths()) == [sample.path for sample in ours()]
        peers = {"os.walk alone": walk, "os.walk, its paths joined": walk_with_paths}
        yield from race(f"listing {FILES:,} files", ours, peers, rounds)


def rows(rounds):
    with tempfile.TemporaryDirectory() as data:
        table = Path(data, "metadata.csv")
        with table.open("w", encoding="utf-8") as file:
            file.write("file_name,label,split,group\n")
            for number in range(ROWS):
                split = "train" if number % 10 else "test"
                cells = f"clip_{number:07d}.wav", f"class_{number % 100}", split, f"by_{number % 5000}"
                file.write(f"audio/{number // 1000:04d}/{','.join(cells)}\n")

        def read():
            with table.open(newline="", encoding="utf-8") as file:
                return list(csv.reader(file))

        def ours():
            return find_samples(data, "audio")

        found = {(sample.path, sample.label, sample.split, sample.group) for sample in ours()}
        assert found == {(f"{data}/{name}", *others) for name, *others in read()[1:]}
        del found
        yield from race(f"metadata.csv of {ROWS:,} rows", ours, {"list(csv.reader) alone": read}, rounds)


if __name__ == "__main__":
    run(__doc__, [files, rows], rounds=5)
