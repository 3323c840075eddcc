"""Executed notebooks of the tutorials: `make tutorials` runs each source of docs/tutorials and writes its .ipynb.

    python docs/building/tutorials.py [NAME ...]

A source is a Python file with cells (jupytext's percent format). What it writes lies in a folder that is removed.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).parents[1] / "tutorials"


def read(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs; the same at each call."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)  # else a new one at each time
    return without_metadata(notebook)


def execute(source: Path) -> nbformat.NotebookNode:
    """The notebook with what its cells print and draw; progress bars and warnings (stderr) are left out.

    Raises:
        CellExecutionError: of nbclient, a cell raised.
    """
    notebook = read(source)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = list(printed_and_drawn(cell.outputs))
    return without_metadata(notebook)


def printed_and_drawn(outputs: list) -> Iterator[nbformat.NotebookNode]:
    """Without stderr; what was printed in several pieces is one."""
    kept = [output for output in outputs if output.get("name") != "stderr"]
    for kind, group in itertools.groupby(kept, key=lambda output: output.output_type):
        first, *others = group
        if kind == "stream":
            first.text += "".join(output.text for output in others)
            others = []
        yield from (first, *others)


def without_metadata(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same, in place: times of execution and versions would differ from one run to the next."""
    for cell in notebook.cells:
        cell.metadata = {}
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": python, "language_info": {"name": "python"}}
    return notebook


def main() -> None:
    """Execute and write those that are named, or all."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for source in sorted(FOLDER.glob("*.py")):
        if len(sys.argv) == 1 or source.stem in sys.argv[1:]:
            started = time.monotonic()
            notebook = execute(source)
            nbformat.write(notebook, source.with_suffix(".ipynb"))
            size = source.with_suffix(".ipynb").stat().st_size
            print(f"{source.stem}: {time.monotonic() - started:.0f} s, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
