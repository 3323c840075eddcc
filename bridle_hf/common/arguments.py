"""Arguments of commands: a YAML recipe first, then overrides, `--name value` or keywords of a Python call.

    bridle pretrain audio_demo --data DIR --output_dir OUT --encoder.hidden_size 256
    bridle_hf.pretrain("audio_demo", data=DIR, output_dir=OUT, encoder={"hidden_size": 256})

Every error about an argument is one line that names the field. Importing this imports neither torch nor transformers.
"""

import json
import re
from argparse import ArgumentParser, ArgumentTypeError
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from bridle_hf.common.errors import ArgumentError, nearest
from bridle_hf.common.recipes import find_recipe


_OTHERWISE = ("int", "float", "bool", "timestamp")


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: `1e-3` is a number and `no` a word, unlike in PyYAML's 1.1."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _OTHERWISE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{twice[0]} is there twice in one mapping, of which the first would be lost")
        return super().construct_mapping(node, deep)


# What begins with a 0, as 010, is the name of a fold or group more often than a number.
_INT = r"^[-+]?(0|[1-9][0-9]*)$"
_FLOAT = r"^([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INT), list("-+0123456789"))
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(text: str) -> Any:
    """What a recipe or an option holds.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"not YAML: {error}") from error


class YamlMapping(dict):
    """A mapping as YAML text: `{hidden_size: 128}`; on the command line key by key: `--encoder.hidden_size 8`."""

    def __init__(self, text: str):
        value = _load_value(text)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ArgumentTypeError(f"expected a mapping of names to values, got {text!r}")
        super().__init__(value)


class YamlSequence(tuple):
    """A sequence of mappings given as YAML text: `[{train: encoder, steps: 600}]`."""

    def __new__(cls, text: str):
        value = _load_value(text)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise ArgumentTypeError(f"expected a list of mappings, got {text!r}")
        return super().__new__(cls, value)


def _load_value(text: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError as error:
        # The one exception whose text argparse shows.
        raise ArgumentTypeError(str(error)) from error


def parse_command_line(*dataclass_types: type, argv: Sequence[str], takes_recipe: bool = True) -> tuple[Any, ...]:
    """Instances of `dataclass_types` from `[RECIPE] [--name value ...]`; later values win.

    Args:
        takes_recipe: whether the first word may name a recipe, see [`find_recipe`].

    Raises:
        ArgumentError: an unknown name (with the nearest valid one), a missing or a wrong value.
    """
    argv, recipe = list(argv), None
    values: dict[str, Any] = {}
    names = _names(dataclass_types)
    if argv and not argv[0].startswith("-"):
        if not takes_recipe:
            raise ArgumentError(f"'{argv[0]}' is one word too many: write --name value")
        recipe = argv.pop(0)
        values = _read_recipe(recipe, names)
    options = _as_options(_without_empty(dataclass_types, values)) + _without_dotted(argv, values, names)
    return _parse(dataclass_types, options, recipe)


def make_arguments(*dataclass_types: type, recipe: str | None, values: dict[str, Any]) -> tuple[Any, ...]:
    """Instances of `dataclass_types` from a recipe and, on top of it, `values`.

    Args:
        recipe: name or path of a recipe, see [`find_recipe`]; `None`: none.
        values: by field. A mapping changes the recipe's entry by entry; `None` stands for the field's default.

    Raises:
        ArgumentError: an unknown name (with the nearest valid one), a missing or a wrong value.
    """
    names = _names(dataclass_types)
    for name in values:
        if name not in names:
            raise ArgumentError(f"unknown argument '{name}'{nearest(name, names)}")
    values = merged({} if recipe is None else _read_recipe(str(recipe), names), values)
    return _parse(dataclass_types, _as_options(_without_empty(dataclass_types, values)), recipe)


def _without_empty(dataclass_types: Sequence[type], values: dict[str, Any]) -> dict[str, Any]:
    """Without empty lists where that is the default: an option cannot be given without a value."""
    empty = {entry.name for kind in dataclass_types for entry in fields(kind) if entry.default_factory is list}
    return {name: value for name, value in values.items() if value != [] or name not in empty}


def _parse(dataclass_types: Sequence[type], options: list[str], recipe: str | None) -> tuple[Any, ...]:
    try:
        *instances, unknown = _make_parser(dataclass_types).parse_args_into_dataclasses(
            options, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        # From a dataclass that checks its fields.
        raise ArgumentError(str(error)) from error
    if unknown and unknown[0].startswith("--"):
        name = unknown[0].removeprefix("--").split("=")[0].split(".")[0]
        raise ArgumentError(f"unknown argument '{unknown[0]}'{nearest(name, _names(dataclass_types))}")
    if unknown:
        before = [option for option in options[: options.index(unknown[0])] if option.startswith("--")]
        raise ArgumentError(f"{before[-1] if before else 'arguments'}: '{unknown[0]}' is one value too many")
    if recipe is not None:
        _check_outside(find_recipe(str(recipe)), instances)
    return tuple(instances)


def _check_outside(recipe: Path, instances: Sequence[Any]) -> None:
    """Refuse a recipe where the run writes: --overwrite might remove it."""
    for out in [getattr(instance, "output_dir", None) for instance in instances]:
        if out is not None and recipe.resolve().is_relative_to(Path(out).resolve()):
            raise ArgumentError(f"recipe {recipe} lies inside output_dir {out}: choose another folder")


def _make_parser(dataclass_types: Sequence[type]) -> ArgumentParser:
    from transformers import HfArgumentParser

    class OneLineParser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ArgumentError(message.removeprefix("argument "))

    return OneLineParser(dataclass_types, allow_abbrev=False, add_help=False)


def _names(dataclass_types: Sequence[type]) -> list[str]:
    return [entry.name for dataclass_type in dataclass_types for entry in fields(dataclass_type)]


def _read_recipe(name: str, known: list[str]) -> dict[str, Any]:
    path = find_recipe(name)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"recipe {path}: {error.strerror}") from error
    except ValueError as error:
        raise ArgumentError(f"recipe {path}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ArgumentError(f"recipe {path}: expected a mapping of names to values")
    for key in values:
        if key not in known:
            raise ArgumentError(f"{name}: unknown key '{key}'{nearest(key, known)}")
    return values


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, mappings entry by entry."""
    found = dict(values)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = merged(found[name], value) if both else value
    return found


def _as_options(values: dict[str, Any]) -> list[str]:
    """A recipe as command-line options, so that both go through one parser."""
    options = []
    for name, value in values.items():
        if value is None:
            continue
        options.append(f"--{name}")
        if isinstance(value, dict) or (
            isinstance(value, (list, tuple)) and any(isinstance(entry, dict) for entry in value)
        ):
            # JSON, because it reads as YAML of any version.
            options.append(json.dumps(value, default=str))
        elif isinstance(value, (list, tuple)):
            options.extend(map(str, value))
        else:
            options.append(str(value))
    return options


def _without_dotted(argv: list[str], recipe: dict[str, Any], names: list[str]) -> list[str]:
    """Take `--encoder.hidden_size 256` and `--phases.0.steps 10` out of `argv`, on top of the recipe's value."""
    rest, structures = [], {}
    position = 0
    while position < len(argv):
        option, equals, value = argv[position].partition("=")
        name, *path = option.removeprefix("--").split(".")
        position += 1
        if not option.startswith("--") or not path or name not in names:
            rest.append(argv[position - 1])
            continue
        if not equals:
            if position == len(argv) or argv[position].startswith("--"):
                raise ArgumentError(f"{option}: expected a value")
            value = argv[position]
            position += 1
        try:
            _set(structures.setdefault(name, recipe.get(name) or {}), path, read_yaml(value))
        except ValueError as error:
            raise ArgumentError(f"{option}: {error}") from error
    for name in structures:
        if any(argument.split("=")[0] == f"--{name}" for argument in rest):
            raise ArgumentError(f"--{name} is given as a whole and in parts: choose one")
    return _as_options(structures) + rest


def _set(structure: Any, path: list[str], value: Any) -> None:
    try:
        for part in path[:-1]:
            structure = structure[int(part)] if isinstance(structure, list) else structure[part]
        structure[int(path[-1]) if isinstance(structure, list) else path[-1]] = value
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError("the recipe has no such entry") from error


def check_ranges(args: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise a `ValueError` unless each of these fields is unset or from the least to the most."""
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name} is {value}: expected {least:g} to {most:g}")


def check_name(where: str, name: str, known: Iterable[str]) -> None:
    """Raise a `ValueError` unless `name` is one of `known`."""
    if name not in known:
        raise ValueError(f"{where}.{name} is not a field{nearest(name, list(known))}")
