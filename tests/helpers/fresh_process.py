"""Runs of Python code in a process of its own, with `bridle_hf` or, for remote code, surely without it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from helpers.waiting import DEADLINE


ROOT = Path(__file__).parents[2]


def run_fresh(code: str, folder: Path, package: bool, **environment: str) -> str:
    """Run `code`, with `folder` as its working directory and the place of its caches, and return what it prints.

    Args:
        package: Whether the process can import `bridle_hf`; in one that can't, an installed copy is hidden, too.
        environment: Variables set before anything is imported.
    """
    hide = "" if package else "sys.modules['bridle_hf'] = None  # a further import raises ImportError"
    # `-I` keeps the working directory and PYTHONPATH out of `sys.path`; the tests' folder is added for its helpers.
    prologue = f"""
        import sys
        sys.path += {[str(ROOT / "tests"), *([str(ROOT)] if package else [])]!r}
        {hide}
        import torch
        torch.set_num_threads(1)
    """
    caches = {"HF_HOME": str(folder / "hf_home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(prologue) + textwrap.dedent(code)],
        env={**kept, **caches, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
