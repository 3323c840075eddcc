"""Help texts of the commands: made of their dataclasses, which import nothing large."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


WIDTH = 100
RECIPE = "RECIPE: the name of a recipe, as audio_base (`bridle recipes` lists them), or the path of a YAML file."


def overview(commands: Mapping[str, Any]) -> str:
    """What `bridle` alone shows."""
    lines = ["usage: bridle COMMAND ...", ""]
    lines += [f"  {name:<10}{command.summary}" for name, command in commands.items()]
    lines += ["", "`bridle COMMAND --help` tells its options."]
    lines += ["On several GPUs: `accelerate launch -m bridle_hf.pretraining RECIPE ...`, or -m bridle_hf.finetuning."]
    return "\n".join(lines)


def command_help(name: str, command: Any, dataclass_types: Sequence[type]) -> str:
    """What `bridle COMMAND --help` shows: usage and recipe, then its own options, then which others it takes."""
    lines = [f"usage: bridle {name} {command.usage}".rstrip(), *_wrapped(command.summary + ".", "")]
    if command.takes_recipe:
        lines += [
            RECIPE,
            "Options come on top of what the recipe says; a mapping's entries as --encoder.hidden_size 256.",
        ]
    for dataclass_type in dataclass_types:
        hints = get_type_hints(dataclass_type)
        lines += ["", "Options:"]
        for entry in fields(dataclass_type):
            lines += _option_lines(entry, hints[entry.name], entry.name in command.positionals)
    if command.more:
        lines += ["", command.more]
    return "\n".join(lines)


def _option_lines(entry: Field, hint: Any, positional: bool) -> Iterator[str]:
    name = entry.name.upper() if positional else f"--{entry.name}"
    text, default = entry.metadata.get("help", ""), _default(entry)
    if choices := [
        choice for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal for choice in get_args(kind)
    ]:
        text += f": {', '.join(choices)}"
    if default is None:
        text += " (required)"
    elif default and "default" not in text:
        text += f" (default: {default})"
    lines = _wrapped(text, " " * 28)
    if len(name) < 25:
        lines[0] = f"  {name:<26}" + lines[0].lstrip()
    else:
        yield f"  {name}"
    yield from lines


def _default(entry: Field) -> str | None:
    """As it would be written; empty if there is nothing to tell, `None` if it must be given."""
    if entry.default is MISSING and entry.default_factory is MISSING:
        return None
    value = entry.default if entry.default_factory is MISSING else entry.default_factory()
    if value is None or value is False or value in ((), [], {}):
        return ""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
