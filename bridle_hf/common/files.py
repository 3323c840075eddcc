"""Files written whole: a reader, or a run that is killed meanwhile, sees the old file or the new one."""

import io
import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a JSON file holds; `None` if there is none.

    Raises:
        ValueError: it is not JSON: names the file. OSError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(path, picture.getvalue())


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
