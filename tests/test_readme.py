"""What the README shows: its Python runs, its commands parse, and the files and targets that it names exist."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.saved_folders import make_models, save_all

from bridle_hf.finetuning.arguments import FinetuneArguments
from bridle_hf.finetuning.training_arguments import FinetuneTrainingArguments
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.probing.arguments import ProbeArguments


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "training/README.md", "CONTRIBUTING.md", "model_cards/README.md"]
OPTIONS = {
    "pretrain.py": (PretrainArguments,),
    "finetune.py": (FinetuneArguments, FinetuneTrainingArguments),
    "probe.py": (ProbeArguments,),
}


def test_python_snippets_run_in_order(tmp_path, monkeypatch):
    save_all(make_models(), tmp_path)
    (tmp_path / "OUT").mkdir()
    for kind, name in {"pretraining": "OUT/encoder", "tokenizer": "OUT/tokenizer", "classifier": "CLASSIFIER"}.items():
        (tmp_path / kind).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 5
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    codes, features = names["codes"], names["features"]
    assert codes.shape[:2] == features.shape[:2] and codes.shape[2] == 2


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_their_options_and_recipes(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ {4}(?:accelerate launch|python) training/(.*)$", text, re.MULTILINE):
        script, *words = shlex.split(line.split("#")[0].replace("[", "").replace("]", ""))
        assert (ROOT / "training" / script).exists()
        known = {field.name for arguments in OPTIONS.get(script, ()) for field in fields(arguments)}
        for word in words:
            if word.endswith(".yaml") and "NAME" not in word:
                assert (ROOT / word).exists(), f"{page}: {word}"
            if word.startswith("--") and known:
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
