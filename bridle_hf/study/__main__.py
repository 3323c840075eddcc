"""One run of a study in this process, as `study.py` starts it: GRID SET ARM SEED OUT PREFIXES [CACHE_DIR]."""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import bridle_hf
from bridle_hf.common.errors import ArgumentError, RunError


def main(grid: str, set_name: str, arm: str, seed: str, out: str, prefixes: str, cache_dir: str | None = None) -> int:
    """Exit status: 0 if the run is done, 3 if it was stopped and can go on.

    Args:
        out: the folder of the study.
        prefixes: numbers of the first phases that the run shares with others, as `1,2`.
    """
    bridle_hf.load()
    from bridle_hf.study.grid import read_grid
    from bridle_hf.study.prefixes import prefixes_of
    from bridle_hf.study.run import carry_out, folder_of
    from bridle_hf.study.study import STOPPED

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    key = set_name, arm, int(seed)
    (spec,) = [spec for spec in read_grid(grid) if (spec.set, spec.arm, spec.seed) == key]
    shared = [prefix for prefix in prefixes_of(spec, Path(out)) if str(prefix.phases) in prefixes.split(",")]
    try:
        return 0 if carry_out(spec, cache_dir, folder_of(spec, Path(out)), shared) else STOPPED
    except (ArgumentError, RunError) as error:
        logging.error(" ".join(str(error).split()))  # the last line of the log: the study tells it
        return 1


def _end_with(parent: int) -> None:
    """Stop as by a signal when the study that started this process is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
