"""Errors that a user can act on. train.py and eval.py print them in one line, without a traceback."""


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
