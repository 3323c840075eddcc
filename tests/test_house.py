"""The house: which file may import which, how many lie in a room, and that docs/house.md names them all."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bridle_hf"
# From the bottom up: a room imports itself and what stands before it.
ROOMS = (
    "common", "data", "embedding", "exporting", "interleaving", "monitoring", "probing", "cards", "finetuning",
    "pretraining", "sets", "demos", "study", "release", "commands",
)  # fmt: skip
MODEL_FILES = sorted(PACKAGE.glob("*_bridle*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
AT_THE_TOP = {"torch", "numpy", "transformers", "huggingface_hub", *sys.stdlib_module_names}
MOST_FILES = 12


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names of the package's modules (and of things in them) that a file imports, with their lines."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def without_functions(tree: ast.Module) -> ast.Module:
    """The file without what is imported when a function is called, or for type checkers alone."""

    class Drop(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else node

    return Drop().visit(tree)


def module_of(name: str) -> Path | None:
    """The file that a dotted name of the package is, or is in."""
    parts = name.split(".")
    while parts and parts[0] == PACKAGE.name:
        for path in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
            if path.exists():
                return path
        parts.pop()
    return None


def dependencies(path: Path) -> dict[Path, int]:
    """The package's files that a file imports, each with a line; packages themselves (`__init__.py` of rooms) too.

    Functions count, but in `bridle_hf/__init__.py`, in the commands and in `__main__.py`: these import what they run
    when they run it.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path == PACKAGE / "__init__.py" or path.name == "__main__.py" or room_of(path) == "commands":
        tree = without_functions(tree)
    found = {module_of(name): line for name, line in imported(path, tree)}
    return {module: line for module, line in found.items() if module not in (None, path)}


def room_of(path: Path) -> str | None:
    """The room of a file; `None` for those that lie flat in the package."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def rooms() -> list[Path]:
    """Every folder of the package that holds Python files, rooms within rooms too."""
    return sorted({path.parent for path in MODULES} - {PACKAGE})


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_model_files_import_siblings_and_four_libraries(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, (
                f"line {node.lineno}: from .file import name"
            )
            assert (PACKAGE / f"{node.module}.py") in MODEL_FILES, f"line {node.lineno}: {node.module}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            assert name.split(".")[0] != PACKAGE.name, f"line {node.lineno}: {name}"
            # What stands under an `if` or in a function may be missing where the model runs.
            assert node not in tree.body or name.split(".")[0] in AT_THE_TOP, f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_remote_code_asks_for_no_other_library(path):
    """Those that stand outside of a `try`, in functions too, transformers wants before it loads any model."""
    assert {name.split(".")[0] for name in get_imports(path)} <= AT_THE_TOP


def test_rooms_import_only_what_is_below_them():
    assert {room_of(path) for path in MODULES} - {None} <= set(ROOMS), "a new room takes its place in ROOMS"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module.relative_to(ROOT)}"
        for path in MODULES
        for module, line in dependencies(path).items()
        if path.name != "__main__.py" and room_of(module) and not is_below(room_of(module), room_of(path))
    ]
    assert not wrong, "\n".join(wrong)


def is_below(room: str, other: str | None) -> bool:
    return other is not None and ROOMS.index(room) <= ROOMS.index(other)


def test_no_files_import_each_other_in_a_circle():
    graph = {path: set(dependencies(path)) for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(str(path.relative_to(ROOT)) for path in error.args[1]))


def test_only_commands_print_and_exit():
    """And what is run by its name: `__main__.py`, and what stands under `if __name__ == "__main__"`."""

    class Calls(ast.NodeVisitor):
        def __init__(self):
            self.found = []

        def visit_If(self, node: ast.If) -> None:
            if "__name__" not in ast.unparse(node.test):
                self.generic_visit(node)

        def visit_Name(self, node: ast.Name) -> None:
            self.found += [node.lineno] if node.id in ("print", "exit", "quit", "SystemExit") else []

        def visit_Attribute(self, node: ast.Attribute) -> None:
            self.found += [node.lineno] if ast.unparse(node) in ("sys.exit", "sys.stdout", "accelerator.print") else []
            self.generic_visit(node)

    wrong = []
    for path in MODULES:
        if room_of(path) != "commands" and path.name != "__main__.py":
            calls = Calls()
            calls.visit(ast.parse(path.read_text(encoding="utf-8")))
            wrong += [f"{path.relative_to(ROOT)}:{line}" for line in calls.found]
    assert not wrong, wrong


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.relative_to(PACKAGE)))
def test_few_files_lie_in_a_room(room):
    files = [path.name for path in room.iterdir() if path.is_file() and path.name != "__init__.py"]
    assert len(files) <= MOST_FILES, sorted(files)


def test_only_tests_edit_the_import_path():
    scripts = [*MODULES, *(ROOT / "training").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "model_cards").rglob("*.py")]
    assert not [path for path in scripts if "sys.path" in path.read_text(encoding="utf-8")]


SECTIONS = {"Args", "Returns", "Yields", "Raises", "Attributes", "Buffers", "Example"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_and_rules_have_one_style(path):
    """Sections by these names, their entries in lower case but for proper names; rules of one line."""
    text = path.read_text(encoding="utf-8")
    rules = [line for line in text.splitlines() if re.match(r"\s*# ?[-=*#]{2,}", line)]
    assert all(re.fullmatch(r"\s*# --- \S.*\S ---", rule) for rule in rules), rules
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (docstring := ast.get_docstring(node)):
            headings = re.findall(r"^(\w[\w, ]*):$", docstring, re.MULTILINE)
            assert set(headings) <= SECTIONS, (node.name, headings)
            for section in re.findall(r"^(?:Args|Raises):\n((?: {4}.*\n?)+)", docstring, re.MULTILINE):
                starts = re.findall(r"^ {4}[\w., *]+: ([A-Z][a-z]+ ?)", section, re.MULTILINE)
                assert {start.strip() for start in starts} <= {"Hub", "General"}, (node.name, starts)


def test_the_page_names_every_room_and_file():
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `([\w/]+)` \|", page, re.MULTILINE))
    assert table == {str(room.relative_to(PACKAGE)) for room in rooms()} | {"recipes"}
    sections = dict(re.findall(r"^## (.+)\n\n((?:\* .*\n?)+)", page, re.MULTILINE))
    named = {title: files_named(text) for title, text in sections.items()}
    assert named.pop("bridle_hf, the model files") == {path.name for path in MODEL_FILES}
    assert named.pop("training") == {path.name for path in (ROOT / "training").iterdir() if path.is_file()}
    there = {
        str(room.relative_to(PACKAGE)): {
            path.name for path in room.iterdir() if path.is_file() and path.name != "__init__.py"
        }
        for room in rooms()
    }
    assert named == there


def files_named(text: str) -> set[str]:
    """The files that the bullets of a section begin with."""
    heads = re.findall(r"^\* (.*?): ", text, re.MULTILINE)
    return {name for head in heads for name in re.findall(r"`([\w.]+\.\w+)`", head)}
