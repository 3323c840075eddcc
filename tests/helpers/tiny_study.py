"""A study of seconds: a grid on a few recordings."""

from pathlib import Path

import yaml
from helpers.tiny_run import write_recipe


STEPS = {"like": 0, "steps": 2}


def write_grid(folder: Path, data: Path, **changes) -> str:
    sounds = {"data": str(data), "recipe": write_recipe(folder / "recipe.yaml"), "tasks": {"kind": {"folds": 4}}}
    grid = {
        "seeds": [0, 1],
        "options": {"keep_iterations": True},
        "sets": {"sounds": sounds},
        "arms": {
            "input": {"features": "input", "seeds": [0]},
            "untrained": {"features": "untrained", "seeds": [0]},
            "rq": {"phases": [STEPS, {"like": 1, "steps": 2}, {"like": 2, "steps": 2}]},
            "mae": {"encoder": {"target": "patches"}, "phases": [STEPS]},
            "bad": {"encoder": {"hidden_size": 15}, "seeds": [0]},
        },
        "comparisons": [["rq@0", "mae@0"], ["rq@1", "patches"], ["rq@1", "nothing"]],
        **changes,
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    return str(folder / "grid.yaml")
