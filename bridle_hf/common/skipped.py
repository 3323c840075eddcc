"""Skipped files, the ledger of what could not be read, kept in OUT/skipped.jsonl; and skipped steps, not finite."""

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from bridle_hf.common.errors import NonFiniteError, TooManyBadFiles
from bridle_hf.common.files import write_text


logger = logging.getLogger(__name__)

MAX_BAD_FRACTION = 0.1
# A run ends when more than so many of so many steps in a row are skipped: a tenth.
MAX_SKIPPED_STEPS, STEPS_LOOKED_BACK = 20, 200


class SkippedFiles:
    """The ledger of bad files, kept in the main process.

    Each file is counted once, warned of once and written as a line {"path", "reason"} to `output_path`
    (`OUT/skipped.jsonl`), appended at once so that a crash loses none.

    Args:
        output_path: file to append to.
        total: number of samples that the run reads from.
        shared: several processes write the file; what others have written counts, too.
    """

    def __init__(self, output_path: str | os.PathLike, total: int, shared: bool = False):
        self.output_path, self.total, self.shared = Path(output_path), total, shared
        self.reasons: dict[str, str] = {}

    def add(self, path: str, reason: str) -> None:
        """Count a bad file.

        Raises:
            TooManyBadFiles: more than 10% of all samples are bad by now.
        """
        if path not in self.reasons:
            self._read_others()
        if path in self.reasons:
            return
        self.reasons[path] = reason
        logger.warning("skipped %s: %s", path, reason)
        with open(self.output_path, "a", encoding="utf-8") as file:
            file.write(self._line(path))
        if len(self.reasons) > MAX_BAD_FRACTION * self.total:
            raise TooManyBadFiles(
                f"{len(self.reasons)} of {self.total} files cannot be read, more than {MAX_BAD_FRACTION:.0%}: "
                f"see {self.output_path}; mend or remove them. The last is {path}: {reason}"
            )

    def update(self, skipped: Iterable[tuple[str, str]]) -> None:
        """`add` each (path, reason)."""
        for path, reason in skipped:
            self.add(path, reason)

    def state_dict(self) -> dict[str, str]:
        """Path to reason, JSON-serialisable."""
        self._read_others()
        return dict(self.reasons)

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Take the ledger back to `state`, the file too: what came after the checkpoint will be found again."""
        self.reasons = dict(state)
        write_text(self.output_path, "".join(map(self._line, self.reasons)))

    def _read_others(self) -> None:
        if not self.shared or not self.output_path.exists():
            return
        for line in self.output_path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
                entry = json.loads(line)
                self.reasons.setdefault(entry["path"], entry["reason"])

    def _line(self, path: str) -> str:
        return json.dumps({"path": path, "reason": self.reasons[path]}, ensure_ascii=False) + "\n"


class SkippedSteps:
    """Steps left out because their loss or gradient was not finite: the first is warned of, a share ends the run."""

    def __init__(self) -> None:
        self.recent: list[int] = []
        self._warned = False

    def update(self, step: int, skipped: bool, files: Sequence[str]) -> None:
        """Take in a step that is done; `files` are those of its batch, as far as this process had them.

        Raises:
            NonFiniteError: more than 20 of the last 200 steps have been skipped.
        """
        if not skipped:
            return
        if not self._warned:
            self._warned = True
            logger.warning("step %d is skipped, because its loss or gradient is not finite; its files: %s",
                           step, ", ".join(files))  # fmt: skip
        self.recent = [*(number for number in self.recent if number > step - STEPS_LOOKED_BACK), step]
        if len(self.recent) > MAX_SKIPPED_STEPS:
            raise NonFiniteError(
                f"loss or gradient not finite in {len(self.recent)} of the last {STEPS_LOOKED_BACK} steps, up to "
                f"{step}: lower the learning rate, or look into the files of the last: {', '.join(files)}"
            )

    def check_whole_run(self, skipped: int, total: int) -> None:
        """Refuse to call a run done of which most steps have been skipped.

        Raises:
            NonFiniteError: more than half of them have.
        """
        if skipped > total / 2:
            raise NonFiniteError(f"loss or gradient not finite in {skipped} of all {total} steps: nothing was learned")

    def state_dict(self) -> list[int]:
        """The steps skipped of late, JSON-serialisable."""
        return list(self.recent)

    def load_state_dict(self, state: list[int]) -> None:
        self.recent = list(state)
