"""Tutorials: each source runs as it stands; its notebook is what the source says, executed, small and clean."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError


FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
SOURCES = sorted(FOLDER.glob("*.py"))
MOST_BYTES = 300_000


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebooks_are_their_sources_executed(source):
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert code == [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells], "run make tutorials"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {output.output_type for output in outputs}
    assert kinds <= {"stream", "execute_result", "display_data"}, "an error"
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert len(text) < MOST_BYTES
    # Pictures are base64, in which a path could be found by chance.
    shown = re.sub(r'"image/png": "[^"]*"', "", text)
    found = re.findall(r"(?:/home|/root|/tmp|/work|/Users|/usr|[A-Z]:\\\\)[\w/\\.]*", shown)
    assert not found, "paths of a machine"


def test_every_notebook_has_its_source():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SOURCES}


def test_an_error_of_a_cell_is_raised(tmp_path):
    """`make tutorials` writes no notebook with an error in it."""
    spec = importlib.util.spec_from_file_location("tutorials", FOLDER.parent / "building" / "tutorials.py")
    tutorials = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tutorials)
    (tmp_path / "fails.py").write_text("# %%\n1 / 0\n")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        tutorials.execute(tmp_path / "fails.py")
    (tmp_path / "runs.py").write_text("# %%\nimport sys\nprint('no', file=sys.stderr)\n\n# %%\n6 * 7\n")
    first, second = (tutorials.execute(tmp_path / "runs.py") for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert first.cells[0].outputs == [] and first.cells[1].outputs[0].data["text/plain"] == "42"


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_sources_run(source, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, str(source)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
