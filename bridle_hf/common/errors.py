"""Errors that a user meets: bad files, wrong arguments, steps that are not finite; each names what and where."""

import difflib
from collections.abc import Iterable


class ArgumentError(ValueError):
    """Wrong arguments or data, found before anything is done: one line that names the field. A command ends with 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class RunError(RuntimeError):
    """A run that had begun and cannot go on: one line that says why. A command ends with 1."""


class MediaError(ValueError):
    """A file (or row) that cannot be used: names it and says why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def reason_of(error: Exception) -> str:
    """Why a sample cannot be read, without its name where the error has it apart."""
    if isinstance(error, MediaError):
        return error.reason
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def one_line(error: Exception) -> str:
    """An error of any library as one line of text."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def nearest(name: str, names: Iterable[str]) -> str:
    """What to add to an error about a name that is not known: the one that may have been meant, if any is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{found[0]}'?" if found else ""


MAX_SKIPPED_IN_A_ROW = 20


class NonFiniteError(RunError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class TooManyBadFiles(RunError):  # noqa: N818 (the name says the error)
    """More than 10% of the samples cannot be read, or none can."""
