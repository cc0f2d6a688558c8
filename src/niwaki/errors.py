"""The error tree. Every message says what was expected, what came, and the next step.

NiwakiError                 the CLI prints it in one line and exits with 2
├── InputError              something the caller gave is wrong; nothing was written
│   ├── CheckpointError     the model folder, its files or its weights
│   ├── ArchitectureError   a decoder niwaki cannot cover completely
│   ├── CalibrationError    texts, windows, tokens
│   └── TargetError         a target the method or the matrix cannot meet
├── OutputError             the target folder: exists, read-only, full
│   └── ResumeError         an unfinished run that does not match what was asked
├── NumericalError          a computation left the finite numbers
└── MeasuringError          a model could not be run to be measured
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class NiwakiError(Exception):
    """Base of every error niwaki raises on purpose."""


class InputError(NiwakiError):
    """An argument, option or file is wrong."""


class CheckpointError(InputError):
    """A model folder is missing, incomplete, unsafe or holds broken weights."""


class ArchitectureError(InputError):
    """A decoder has parts that niwaki would have to skip silently."""


class CalibrationError(InputError):
    """Texts cannot be read, or do not fill the windows asked for."""


class TargetError(InputError):
    """A target cannot be met by this method, or does not fit a matrix."""


class OutputError(NiwakiError):
    """The result cannot be written where it was asked."""


class ResumeError(OutputError):
    """An unfinished run cannot be continued with these arguments."""


class NumericalError(NiwakiError):
    """A computation produced values that are not finite."""


class MeasuringError(NiwakiError):
    """A model could not be run where it was to be measured."""


@contextmanager
def faults_of(what: str, step: str) -> Iterator[None]:
    """Turn what code raises for a stranger's file, whose fields may have any type and value, into a CheckpointError.

    Errors of niwaki and missing memory pass. `what` is the file and its problem, `step` what the user may do.
    """
    try:
        yield
    except (NiwakiError, MemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(f"{what} ({type(error).__name__}: {lines[0][:200]}): {step}") from error


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """Return one line for an unknown name: the nearest choice first, then all of them."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}choose from {', '.join(known)}"


def format_problem(found: object, readable: Sequence[int]) -> str | None:
    """Return why a file of format `found` cannot be read and what to do, None if it can be read."""
    if found in readable:
        return None
    newer = isinstance(found, int) and found > max(readable)
    step = "install a newer niwaki" if newer else "write it again with this niwaki"
    return f"has format {found!r}, this niwaki reads {' and '.join(map(str, readable))}: {step}"
