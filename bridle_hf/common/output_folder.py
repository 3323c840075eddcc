"""The output folder of a run: what it holds, and the versions that run.json tells."""

import subprocess
from pathlib import Path


def git_revision() -> str | None:
    """Revision of this source tree, if it is a git checkout and git is there to ask."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
