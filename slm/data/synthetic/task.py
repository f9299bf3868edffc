"""What a synthetic task is, and how a source names one with its settings: `synthetic:mqar:pairs=8,length=128`."""

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from slm.config import coerce
from slm.data.synthetic.draws import Draws, Side
from slm.errors import ConfigError, DataError


class Samples(NamedTuple):
    """Samples of a task, (B, L) each; where a sample is shorter than L, the rest is padding."""

    tokens: np.ndarray
    """Inputs."""
    targets: np.ndarray
    """What the model should say at each input; anything where it is not scored."""
    scored: np.ndarray
    """bool: which targets count."""
    lengths: np.ndarray | None = None
    """int (B,): tokens of each sample; None: all L."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task and its settings, which a source string can change. Their docstrings say what is published."""

    own_vocabulary: ClassVar[bool] = True
    """False: it is asked in text, through the run's tokenizer."""

    length: int | None = None
    """Input tokens of a sample; None: data.sequence_length."""
    samples: int = 0
    """Training samples, which each epoch sees again; 0: new ones forever."""
    tests: int = 1024
    """Validation samples."""
    weigh: Literal["targets", "samples"] = "targets"
    """What counts alike in losses and accuracies: each scored target, or each sample, whose targets then share a weight
    of 1. `samples` is what benchmarks amount to whose batches each hold one setting: in a mixture, a sample with 64
    answers counts no more than one with 4. What is reported as `tokens` are then samples."""

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary: the word of each id. Tasks mix where theirs are equal."""
        raise NotImplementedError

    @property
    def shortest(self) -> int:
        """The least `data.sequence_length` that a sample fits into."""
        return self.length or 1

    def check(self) -> str | None:
        """What is wrong with the settings together, if anything."""
        return None

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        """The samples of `draws.indices`; `length` is self.length, or data.sequence_length where that is None."""
        raise NotImplementedError


def numbers(count: int) -> tuple[str, ...]:
    """The vocabulary of tasks whose tokens are plain numbers."""
    return tuple(map(str, range(count)))


def parse(spec: str, tasks: dict[str, type[Task]]) -> tuple[str, Task]:
    """(name, task) of `synthetic:NAME` or `synthetic:NAME:SETTING=VALUE,...`.

    Raises DataError for an unknown task or setting, naming the nearest; for a value of the wrong type or out of range;
    and for settings that contradict each other.
    """
    name, _, rest = spec.removeprefix("synthetic:").partition(":")
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=1)
        hint = f"did you mean synthetic:{near[0]}?" if near else f"there are {', '.join(tasks)}"
        raise DataError(f"no synthetic task '{name}': {hint}")
    hints = typing.get_type_hints(tasks[name])
    known = [field.name for field in dataclasses.fields(tasks[name])]
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        key, equals, text = part.partition("=")
        if not equals or not text:
            raise DataError(f"{spec}: '{part}' is not SETTING=VALUE; synthetic:{name} has {', '.join(known)}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise DataError(f"{spec}: synthetic:{name} has no setting '{key}': {hint}")
        if key in settings:
            raise DataError(f"{spec}: {key} is set twice")
        settings[key] = _value(text, hints[key], f"{spec}: {key}")
    task = tasks[name](**settings)
    for key in ("length", "samples", "tests"):
        least = 0 if key == "samples" else 1
        if (value := getattr(task, key)) is not None and value < least:
            raise DataError(f"{spec}: {key} = {value}: must be at least {least}")
    if problem := task.check():
        raise DataError(f"{spec}: {problem}")
    return name, task


def stream(name: str, task: Task) -> str:
    """Names what the samples are drawn from: the settings that shape a sample, not how many there are."""
    default = type(task)()
    shape = [
        f"{field.name}={getattr(task, field.name)}"
        for field in dataclasses.fields(task)
        if field.name not in ("samples", "tests", "weigh") and getattr(task, field.name) != getattr(default, field.name)
    ]
    return ":".join([name, *shape])


def _value(text: str, hint: Any, where: str) -> Any:
    value: Any = text
    if hint is not str:
        try:
            value = json.loads(text)
        except ValueError:  # a word, for which coerce says what would do
            value = text
    try:
        return coerce(value, hint, where)
    except ConfigError as error:
        raise DataError(str(error)) from None
