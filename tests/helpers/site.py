"""The documentation site, built into a folder."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def build_site(folder: Path) -> None:
    """As `make docs` does; a warning ends it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr
