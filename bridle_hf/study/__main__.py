"""One run of a study in this process, as `study.py` starts it: GRID SET ARM SEED FOLDER [CACHE_DIR]."""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import bridle_hf
from bridle_hf.common.errors import ArgumentError, RunError


def main(grid: str, set_name: str, arm: str, seed: str, folder: str, cache_dir: str | None = None) -> int:
    """Exit status: 0 if the run is done, 3 if it was stopped and can go on."""
    bridle_hf.load()
    from bridle_hf.study.grid import read_grid
    from bridle_hf.study.run import carry_out
    from bridle_hf.study.study import STOPPED

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    key = set_name, arm, int(seed)
    (spec,) = [spec for spec in read_grid(grid) if (spec.set, spec.arm, spec.seed) == key]
    try:
        return 0 if carry_out(spec, cache_dir, Path(folder)) else STOPPED
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
