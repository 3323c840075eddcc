"""The report of a run: whole, self-contained, and readable whatever the run left behind."""

import base64
import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from bridle_hf.monitoring.curves import find_phases, plot_losses, plot_probes, plot_training, plot_usage, step_rows
from bridle_hf.monitoring.report import read_metrics, write_report


HOSTILE = '</title><script>alert("x")</script><img src="http://example.com/x.png" onerror=alert(1)>&amp;{{ 7 * 7 }}'


def make_rows(phases=(("encoder", 0, 60), ("tokenizer", 1, 40), ("encoder", 1, 60)), every=10):
    rows, step = [], 0
    for phase, (kind, iteration, steps) in enumerate(phases):
        for done in range(every, steps + 1, every):
            at = step + done
            row = {"step": at, "phase": phase, "kind": kind, "iteration": iteration, "time": at / 10}
            row |= {"samples": 64 * at, "samples_per_second": 640.0, "data_wait_share": 0.02, "skipped_steps": 0}
            row |= {"usage/used_fraction": [0.9, 1.0], "usage/normalized_entropy": [0.8, 0.9]}
            if kind != "tokenizer":
                row |= {"encoder/loss": 5.5 - done / 60, "encoder/accuracy": [0.3, 0.1], "encoder/lr": 5e-4}
                row |= {"encoder/grad_norm": 1.0}
            if kind != "encoder":
                row |= {"tokenizer/loss": 0.8, "tokenizer/cosine_loss": 0.5, "tokenizer/codebook_loss": 0.3}
                row |= {"tokenizer/lr": 2e-4, "usage/quantization_error": [0.5, 0.3], "usage/reseeded": [2, 0]}
            rows.append(row)
        step += steps
        rows.append({"event": "phase_end", "phase": phase, "step": step, "time": step / 10})
    return rows


def make_run(folder: Path, rows, **files) -> Path:
    (folder / "figures").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """Tags, their attributes and the visible text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def images(self):
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


RUN = {
    "arguments": {"encoder": {"codebook_size": 256}, "seed": 3},
    "modality": "audio",
    "data": "notes",
    "samples": 5366,
    "phases": [
        {"kind": "encoder", "iteration": 0, "steps": 60},
        {"kind": "tokenizer", "iteration": 1, "steps": 40},
        {"kind": "encoder", "iteration": 1, "steps": 600},
    ],
    "versions": {"torch": "2.13.0"},
    "git_revision": None,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything that a report may hold, and its page."""
    results = {
        "title": "Frozen probe",
        "columns": ["features", "accuracy"],
        "rows": [["BRIDLE", 0.6721], ["untrained encoder", 0.512], ["majority", None]],
        "notes": ["4 folds."],
    }
    rows = [*make_rows(), {"step": 160, "phase": 2, "probe/linear": 0.6, "probe/untrained_linear": 0.5}]
    out = make_run(tmp_path_factory.mktemp("run") / "out", rows, run=RUN, results=results)
    (out / "skipped.jsonl").write_text(json.dumps({"path": "a/broken.wav", "reason": "not RIFF"}) + "\n")
    Figure(figsize=(1, 1)).savefig(out / "figures" / "codes_phase_0.png")
    Figure(figsize=(1, 1)).savefig(out / "figures" / "of_my_own.png")
    return out, Page(write_report(out))


def test_report_is_one_file_that_needs_no_network(finished):
    out, page = finished
    assert all(uri.startswith("data:image/png;base64,") for uri in page.images)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not [
        value for _, name, value in page.attributes if name in ("href", "src") and not value.startswith("data:")
    ]
    assert not re.search(r"https?://|url\(|@import", (out / "report.html").read_text())


def test_report_holds_every_picture(finished):
    out, page = finished
    held = {base64.b64decode(uri.split(",")[1]) for uri in page.images}
    pictures = {path.stem: path.read_bytes() for path in (out / "figures").glob("*.png")}
    assert set(pictures) == {"losses", "usage", "training", "probes", "codes_phase_0", "of_my_own"}
    assert held == set(pictures.values()) and len(page.images) == 6
    assert all(alt for tag, name, alt in page.attributes if (tag, name) == ("img", "alt"))
    assert page.text.index("losses.") < page.text.index("codes phase 0.") < page.text.index("of my own.")


def test_report_says_what_was_done(finished):
    _, page = finished
    assert "A BRIDLE audio encoder and its tokenizer, trained in turns on notes (5,366 samples)." in page.text
    assert "160 of 700 optimizer steps done, 10,240 samples in 16 s of training (640 samples/s; 2.0%" in page.text
    assert "0 encoder 0 60 of 60" in page.text and "2 encoder 1 60 of 600" in page.text
    assert "BRIDLE 0.672 untrained encoder 0.512 majority -" in page.text and "4 folds." in page.text
    assert "a/broken.wav not RIFF" in page.text
    assert "encoder.codebook_size 256" in page.text and "torch 2.13.0" in page.text


def test_final_numbers_of_a_phase_are_means_of_its_last_rows(finished):
    _, page = finished
    # Rows at 20..60 of 60 steps: 5.5 - 40 / 60.
    assert "60 of 60 4.833 30 / 10 - 90 / 100 80 / 90" in page.text
    assert "40 of 40 - - 0.8 90 / 100 80 / 90" in page.text


def test_writing_again_changes_nothing_and_leaves_no_temporary_file(finished):
    out, _ = finished
    before = (out / "report.html").read_bytes()
    write_report(str(out))
    assert (out / "report.html").read_bytes() == before
    assert not [path for path in out.rglob("*") if "tmp" in path.name]


def test_hostile_strings_are_shown_as_text(tmp_path):
    run = {"modality": HOSTILE, "data": HOSTILE, "arguments": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    results = [{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]], "notes": [HOSTILE]}]
    out = make_run(tmp_path / "<i>$x_1$", make_rows(), run=run, results=results)
    (out / "skipped.jsonl").write_text(json.dumps({"path": HOSTILE, "reason": HOSTILE}) + "\n")
    Figure(figsize=(1, 1)).savefig(out / "figures" / '"><script>.png')
    page = Page(write_report(out))
    assert "script" not in page.tags and "i" not in page.tags
    assert all(uri.startswith("data:") for uri in page.images)
    assert page.text.count(HOSTILE) >= 9, "nothing is lost either"


def test_run_that_was_killed_or_has_just_begun(tmp_path):
    out = make_run(tmp_path / "killed", make_rows())
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 170, "phase": 2, "kin')
    (out / "figures" / "half.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    page = Page(write_report(out))
    assert "160 optimizer steps done" in page.text and len(page.images) == 3
    assert len(read_metrics(out / "metrics.jsonl")) == len(make_rows())
    (tmp_path / "begun").mkdir()
    page = Page(write_report(tmp_path / "begun"))
    assert "Nothing has been logged yet." in page.text and "None has begun." in page.text


def test_phases_begin_where_the_one_before_ended():
    phases = find_phases(make_rows())
    assert [(phase.name, phase.start, phase.end) for phase in phases] == [
        ("encoder 0", 0, 60),
        ("tokenizer 1", 60, 100),
        ("encoder 1", 100, 160),
    ]
    assert [phase.name for phase in find_phases(make_rows([("joint", 1, 50)]))] == ["joint"]


def test_of_rows_of_one_step_the_last_counts():
    """A run that was resumed has told some steps twice."""
    rows = make_rows()
    again = [row | {"encoder/loss": 1.0} for row in rows if row.get("step") == 160 and "kind" in row]
    assert step_rows(rows + again)[-1]["encoder/loss"] == 1.0
    assert len(step_rows(rows + again)) == len(step_rows(rows)) == 16


def shaded(ax):
    """Left and right edges of the shading."""
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]


@pytest.mark.parametrize("plot", [plot_losses, plot_usage, plot_training])
def test_every_panel_is_shaded_by_phase(plot):
    figure = plot(make_rows())
    for ax in figure.axes:
        assert shaded(ax) == [(0, 60), (60, 100), (100, 160)]
        colors = [patch.get_facecolor() for patch in ax.patches]
        assert colors[0] == colors[2] != colors[1]
        assert ax.get_title(loc="left") and ax.get_ylabel()
    assert [text.get_text() for text in figure.axes[0].texts] == ["encoder 0", "tokenizer 1", "encoder 1"]
    assert figure.axes[-1].get_xlabel() == "optimizer step"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["encoder phase", "tokenizer phase"]


def test_lines_break_at_phases_and_levels_are_named():
    loss, accuracy, tokenizer = plot_losses(make_rows(), codebook_size=256).axes
    curves = [line for line in loss.lines if len(line.get_xdata()) == 6]
    assert len(curves) == 4, "raw and smoothed, in two phases"
    assert len(loss.lines) == 4 + 3 + 1, "beside them the ends of the phases and chance, no stray point at an end"
    assert {tuple(line.get_xdata()[[0, -1]]) for line in curves} == {(10, 60), (110, 160)}
    np.testing.assert_allclose(curves[0].get_ydata(), 5.5 - np.arange(10, 70, 10) / 60)
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["chance: ln 256"]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["level 1", "level 2"]
    assert max(line.get_ydata()[0] for line in accuracy.lines if len(line.get_xdata()) == 6) == pytest.approx(30)
    names = [text.get_text() for text in tokenizer.get_legend().get_texts()]
    assert names == ["sum", "cosine (estimator to teacher)", "codebook"]


def test_joint_run_shows_both_sides_and_encoder_run_its_own_alone():
    assert len(plot_losses(make_rows([("joint", 1, 50)])).axes) == 3
    assert len(plot_losses(make_rows([("encoder", 0, 50)])).axes) == 2
    assert len(plot_losses([]).axes) == 0


def test_what_is_not_finite_leaves_a_gap():
    rows = make_rows([("encoder", 0, 60)])
    rows[2]["encoder/loss"], rows[3]["encoder/accuracy"] = float("nan"), [float("inf"), None]
    loss, accuracy = plot_losses(rows).axes
    assert 30 not in loss.lines[0].get_xdata() and 40 not in accuracy.lines[0].get_xdata()


def test_probes_with_their_controls_dashed():
    rows = [*make_rows(), *({"step": step, "probe/linear": 0.6, "probe/majority": 0.1} for step in (60, 160))]
    (ax,) = plot_probes(rows).axes
    styles = {line.get_label(): line.get_linestyle() for line in ax.lines if not line.get_label().startswith("_")}
    assert styles == {"encoder linear": "-", "majority": "--"}


def test_long_run_stays_quick_to_draw():
    rows = make_rows([("encoder", 0, 20_000)], every=1)
    assert all(len(line.get_xdata()) <= 1000 for line in plot_losses(rows).axes[0].lines)


def test_as_a_command(tmp_path, monkeypatch, capsys):
    out = make_run(tmp_path / "out", make_rows([("encoder", 0, 20)]))
    script = Path(__file__).parents[2] / "training" / "report.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(out)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(out / "report.html") and (out / "report.html").exists()

    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert "the output folder of a run" in capsys.readouterr().err and not (tmp_path / "nowhere").exists()
