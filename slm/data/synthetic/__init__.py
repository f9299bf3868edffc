"""Tasks made of symbols, with right answers: what a sequence model can do, told apart from what it has memorised.

A source `synthetic:NAME` or `synthetic:NAME:SETTING=VALUE,...` is a task of TASKS with its settings, whose defaults are
published ones (the docstrings say whose, and what has been reduced to run in minutes). Each sample is a pure function
of (seed, index). Only answers are scored. One sample fills one row.

A task is a frozen dataclass of settings with a method `draw`, and one line in TASKS.
"""

from slm.data.synthetic.draws import Side
from slm.data.synthetic.mad import (
    Compression,
    FuzzyInContextRecall,
    InContextRecall,
    MADSelectiveCopying,
    Memorisation,
    NoisyInContextRecall,
)
from slm.data.synthetic.memory import InductionHeads, SelectiveCopying
from slm.data.synthetic.passkey import Passkey, PasskeyRows
from slm.data.synthetic.recall import MQAR, CompositionalMQAR, ForgettingMQAR
from slm.data.synthetic.rows import TaskRows, word_tokenizer
from slm.data.synthetic.state_tracking import ModularAddition, RunningParity, WordProblem
from slm.data.synthetic.symbols import VOCABULARY, Addition, Copy, Induction, Parity, Recall, Reverse
from slm.data.synthetic.task import Task, parse
from slm.data.tokenizers import Tokenizer

__all__ = [
    "TASKS",
    "VOCABULARY",
    "Passkey",
    "PasskeyRows",
    "SyntheticRows",
    "Task",
    "asks_text",
    "parse_task",
    "synthetic_tokenizer",
]

TASKS: dict[str, type[Task]] = {
    "copy": Copy,
    "reverse": Reverse,
    "induction": Induction,
    "recall": Recall,
    "addition": Addition,
    "parity": Parity,
    "mqar": MQAR,
    "forgetting_mqar": ForgettingMQAR,
    "compositional_mqar": CompositionalMQAR,
    "induction_heads": InductionHeads,
    "selective_copying": SelectiveCopying,
    "mad_recall": InContextRecall,
    "mad_noisy_recall": NoisyInContextRecall,
    "mad_fuzzy_recall": FuzzyInContextRecall,
    "mad_memorisation": Memorisation,
    "mad_compression": Compression,
    "mad_selective_copying": MADSelectiveCopying,
    "word_problem": WordProblem,
    "running_parity": RunningParity,
    "modular_addition": ModularAddition,
    "passkey": Passkey,
}


def parse_task(spec: str) -> Task:
    """The task that a source `synthetic:...` names. Raises DataError as slm.data.synthetic.task.parse does."""
    return parse(spec, TASKS)[1]


def asks_text(spec: str) -> bool:
    """Whether a source is a task that is asked in text, through the run's tokenizer. Raises DataError as parse_task."""
    return spec.startswith("synthetic:") and not parse_task(spec).own_vocabulary


class SyntheticRows(TaskRows):
    """Rows of a task that has a vocabulary of its own."""

    def __init__(self, spec: str, seed: int, length: int, side: Side):
        task = parse_task(spec)
        self.tokenizer = word_tokenizer(task.words)
        super().__init__(spec, task, self.tokenizer.token_bytes, seed, length, side)


def synthetic_tokenizer(spec: str = "synthetic:copy") -> Tokenizer:
    """The tokenizer of a task's vocabulary: words separated by white space."""
    return word_tokenizer(parse_task(spec).words)
