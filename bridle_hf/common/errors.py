"""Errors that a user meets: bad files, wrong arguments, steps that are not finite; each names what and where."""

import sys


class ArgumentError(SystemExit):
    """A wrong argument: one line that names the field, and exit status 2."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message = " ".join(message.split())
        print(f"error: {message}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return self.message


class MediaError(ValueError):
    """A file (or row) that cannot be used: names it and says why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def reason_of(error: OSError | ValueError) -> str:
    """Why a sample cannot be read, without its name where the error has it apart."""
    if isinstance(error, MediaError):
        return error.reason
    return getattr(error, "strerror", None) or str(error)


def one_line(error: Exception) -> str:
    """An error of any library as one line of text."""
    return " ".join(f"{type(error).__name__}: {error}".split())


MAX_SKIPPED_IN_A_ROW = 20


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class TooManyBadFiles(RuntimeError):  # noqa: N818 (the name says the error)
    """More than 10% of the samples cannot be read, or none can."""
