"""Errors that a user can act on. train.py and eval.py print them in one line, without a traceback."""

import errno
import sys
from collections.abc import Callable

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}


class SlmError(Exception):
    """Base of all errors caused by input, files or settings rather than by a bug. Exit code 2."""


class ConfigError(SlmError):
    """A field is unknown, ill-typed, out of range, or contradicts another. The message names the field and the fix."""


class DataError(SlmError):
    """A source is missing, empty, unreadable, or too small for what was asked of it."""


class CheckpointError(SlmError):
    """A checkpoint is missing, damaged, or of another shape than the model that should receive it."""


class DivergenceError(SlmError):
    """Training produced a NaN, an absurd loss, or was stuck skipping overflowing float16 steps. Names the step."""


def exit_code(command: Callable[[], None]) -> int:
    """Runs a command line's work and returns its exit code.

    0: done. 2: an error that the user can fix, printed in one line on stderr. 130: Ctrl-C. Bugs keep their traceback.
    """
    try:
        command()
    except SlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {error.strerror}: {error.filename or 'while writing'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
