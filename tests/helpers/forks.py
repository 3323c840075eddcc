"""Forks of the test's process, which has imported everything: processes without the seconds that starts take."""

import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState
from helpers.waiting import DEADLINE


def in_forks(log: Path, function: Callable[..., object], *args: object, processes: int = 1) -> str:
    """Call a function in so many processes, each in a session of its own; several meet as a launcher's would.

    Returns:
        What they said, which `log` holds. That one fails, or takes too long, is an error of the test.
    """
    ranks = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            ranks |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    log.write_bytes(b"")
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _become(log, ranks and {**ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                function(*args)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    _wait(children, log)
    return log.read_text(encoding="utf-8")


def _become(log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Not pytest's, which keep what is said for themselves.
    sys.stdout = sys.stderr = os.fdopen(file, "w")
    logging.getLogger().handlers = [logging.StreamHandler(sys.stderr)]
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)


def _wait(children: list[int], log: Path) -> None:
    deadline, left = time.monotonic() + DEADLINE, dict.fromkeys(children)
    while left and time.monotonic() < deadline:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del left[child]
                if status:
                    deadline = 0  # the others wait for it
        time.sleep(0.02)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert deadline and not left, log.read_text(encoding="utf-8")[-4000:]
