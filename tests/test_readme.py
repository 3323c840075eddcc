"""What the README shows: its Python runs, its commands parse, and the files and targets that it names exist."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.saved_folders import make_models, save_all

from bridle_hf.commands import COMMANDS, _find
from bridle_hf.common.recipes import find_recipe


ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md", "training/README.md", "CONTRIBUTING.md", "model_cards/README.md",
    "docs/demos.md", "docs/cost.md", "docs/reference.md", "docs/house.md",
]  # fmt: skip
# Where the README's snippets look for what `make demo` leaves.
FOLDERS = {"pretraining": "pretraining/encoder", "tokenizer": "pretraining/tokenizer", "classifier": "classifier"}
# The command that a line starts: by name, as a room, or by a file of training/.
LAUNCHED = re.compile(r"(?:bridle |.*-m bridle_hf\.|.*\btraining/(?=\w+\.py))(\w+)(?:\.py)?\b(.*)")
ROOMS = {"pretraining": "pretrain", "finetuning": "finetune"}


def test_the_readme_fits_on_a_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_python_snippets_run_in_order(tmp_path, monkeypatch):
    save_all(make_models(), tmp_path)
    demo = tmp_path / "runs" / "demo_audio"
    for kind, name in FOLDERS.items():
        (demo / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / kind).rename(demo / name)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 3
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    codes, features = names["codes"], names["features"]
    assert codes.shape[:2] == features.shape[:2] and codes.shape[2] == 2
    assert names["embedding"].shape == (1, names["encoder"].config.hidden_size)


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_their_options_and_recipes(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ {4}(?:bridle|accelerate launch|torchrun|python) .*$", text, re.MULTILINE):
        if (found := LAUNCHED.fullmatch(line.split("#")[0].strip())) is None:
            continue
        command = COMMANDS[ROOMS.get(found[1], found[1])]
        words = shlex.split(found[2].replace("[", "").replace("]", "").replace("...", ""))
        paths = (*command.arguments, *command.more_arguments)
        known = {field.name for path in paths for field in fields(_find(path))}
        if command.takes_recipe and words and not words[0].startswith("-") and not words[0].isupper():
            assert "NAME" in words[0] or find_recipe(words[0]).is_file(), f"{page}: {line}"
        for word in words:
            if word.startswith("--"):
                assert word.removeprefix("--").split(".")[0] in known, f"{page}: {word}"


@pytest.mark.parametrize("page", PAGES)
def test_links_files_and_targets_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"
    for name in re.findall(r"[\w/]+_bridle(?:_\w+)?\.py", text):
        assert list(ROOT.rglob(name)), f"{page}: {name}"
