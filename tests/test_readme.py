"""README and docs: their Python runs, their commands parse, what they name (options, files, links, targets) exists."""

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.saved_folders import make_models, save_all

from bridle_hf.commands import COMMANDS, _find
from bridle_hf.common.recipes import find_recipe, list_recipes
from bridle_hf.configuration_bridle import MASK_TYPES


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "model_cards/README.md", "training/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES = 130
FUNCTIONS = ("pretrain", "finetune", "probe")
MODULES = {"bridle_hf.pretraining": "pretrain", "bridle_hf.finetuning": "finetune"}
# Of launchers and of every command; `--name value` stands for any.
OF_LAUNCHERS = {"num_processes", "nproc_per_node", "help", "name"}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)


def names_of(command: str) -> set[str]:
    """The options of a command, without their dashes."""
    paths = (*COMMANDS[command].arguments, *COMMANDS[command].more_arguments)
    return {field.name for path in paths for field in fields(_find(path))}


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Every line and every piece of inline code that starts one of our commands: its name and what follows."""
    text = read(page).replace("\\\n", " ")
    lines = re.findall(r"^ {4}.*?((?:bridle|accelerate launch|torchrun|python) .*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:bridle|accelerate launch|torchrun|python) [^`]+)`", text)
    lines += re.findall(r"^srun .*?(torchrun .*)' &$", text, re.MULTILINE)
    found = []
    for line in lines:
        words = shlex.split(re.split(r"\)?\s+#|\)$", line)[0].replace("[", "").replace("]", ""))
        if words[0] == "bridle":
            found.append((words[1], words[2:]))
        for place, word in enumerate(words):
            module = place > 0 and words[place - 1] == "-m"
            if module and word in MODULES:
                found.append((MODULES[word], words[place + 1 :]))
            elif module:
                path = ROOT.joinpath(*word.split("."))
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page}: {word}"
            elif word.startswith("training/") and word.endswith(".py"):
                assert (ROOT / word).exists(), f"{page}: {word}"
                found.append((Path(word).stem, words[place + 1 :]))
    return found


def test_the_readme_fits_on_a_screen():
    assert len(read("README.md").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", ["README.md", "docs/reference.md"])
def test_python_snippets_run_in_order(page, tmp_path, monkeypatch):
    """With a tiny classifier where that of the demo would be; a checkout's files are the checkout's."""
    save_all(make_models(), tmp_path)
    demo = tmp_path / "runs" / "demo_audio"
    demo.mkdir(parents=True)
    (tmp_path / "classifier").rename(demo / "classifier")
    for folder in ("tests", "model_cards"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for snippet in snippets(page):
        exec(compile(snippet, page, "exec"), names)
    if page == "README.md":
        assert names["embedding"].shape == (1, 256) and names["embeddings"].shape == (3, 256)
        assert names["codes"].shape == (1, 64, 4) and names["features"].shape == (1, 64, 32)
    else:
        assert names["model"].config.num_attention_heads == 4


def test_no_other_page_has_python_that_is_not_run():
    assert {page for page in PAGES if snippets(page)} == {"README.md", "docs/reference.md"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_their_options_and_recipes(page):
    for command, words in commands(page):
        assert command in COMMANDS, f"{page}: bridle {command}"
        for word in words:
            if word.startswith("--"):
                assert word.removeprefix("--").split(".")[0] in names_of(command) | {"help"}, (
                    f"{page}: {command} {word}"
                )
        if COMMANDS[command].takes_recipe and words and not words[0].startswith(("-", ".")) and words[0] != "RECIPE":
            assert find_recipe(words[0]).is_file(), f"{page}: {words[0]}"


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_are_those_of_a_command(page):
    known = {name for command in COMMANDS for name in names_of(command)} | OF_LAUNCHERS
    for option in re.findall(r"`--(\w+)", read(page)):
        assert option in known, f"{page}: --{option}"


@pytest.mark.parametrize("page", PAGES)
def test_calls_from_python_have_arguments_of_the_commands(page):
    for call in re.findall(r"`(bridle_hf\.\w+\([^`]*\))`", read(page)):
        node = ast.parse(call, mode="eval").body
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        assert node.func.attr in FUNCTIONS, f"{page}: {call}"
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if isinstance(recipe := given.pop("recipe", None), ast.Constant):
            assert find_recipe(recipe.value).is_file(), f"{page}: {call}"
        assert set(given) <= names_of(node.func.attr), f"{page}: {call}"


@pytest.mark.parametrize("page", PAGES)
def test_links_files_and_targets_exist(page):
    text = read(page)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"
    for name in re.findall(
        r"\b(?:bridle_hf|tests|training|docs|model_cards)/[\w/]+\.(?:py|md|yaml|safetensors)", text
    ):
        assert (ROOT / name).exists(), f"{page}: {name}"
    for name in re.findall(r"`((?:bench_)[\w]+\.py)`", text):
        assert (ROOT / "tests" / "benchmarks" / name).exists(), f"{page}: {name}"


def test_the_guide_lists_every_recipe():
    table = read("training/README.md").split("## Recipes")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    assert named == set(list_recipes())


def test_the_masks_of_the_readme_are_those_of_the_config():
    row = re.search(r"^\| masks \| (.*) \|$", read("README.md"), re.MULTILINE)[1]
    shown = {name: set(kinds.split(", ")) for name, kinds in zip(["audio", "image", "video"], row.split(" | "))}
    assert shown == {name: set(kinds) for name, kinds in MASK_TYPES.items()}


def test_the_results_of_the_readme_are_those_of_the_demos():
    table = read("README.md").split("## Results")[1].split("\n## ")[0]
    shown = {number for row in re.findall(r"^\| .*", table, re.MULTILINE) for number in re.findall(r"\d+\.\d", row)}
    assert len(shown) > 15 and shown <= set(re.findall(r"\d+\.\d", read("docs/demos.md")))
