"""State tracking: running products of group elements, of which running parity is the smallest."""

import functools
import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

from slm.data.synthetic.draws import Draws, Side
from slm.data.synthetic.task import Samples, Task, numbers

LARGEST = 1000
"""Elements of a group; its table of products is held."""


@dataclass(frozen=True, kw_only=True)
class WordProblem(Task):
    """The word problem of a finite group (Liu et al. 2023, arXiv:2210.10749; Merrill et al. 2024, arXiv:2404.08819).

    Tokens are elements, drawn alike; the target at t is x_1 x_2 ... x_t, scored at every t. Element 0 is the identity.
    Products of permutations: (p q)(i) = p(q(i)).

    Published: the groups Z60, A4xZ5, A5 (60 elements each) and S5 (120), each length a data set of its own
    (github.com/jopetty/word-problem); S5 with training on length 128 and tests up to 512 (Siems et al. 2025,
    DeltaProduct, arXiv:2502.10297; the default, but for the number of samples). Reduced: `length=32`, or `group=S3`.
    """

    length: int = 128
    group: str = "S5"
    """Z and a number, S and a number, A and a number: cyclic, symmetric, alternating; or a product, such as A4xZ5."""
    shortest_word: int | None = None
    """Words have from this many tokens on up to `length`; None: all have `length`."""

    @property
    def words(self) -> tuple[str, ...]:
        return numbers(len(product_table(self.group)))

    def check(self) -> str | None:
        try:
            product_table(self.group)
        except ValueError as error:
            return f"group = {self.group}: {error}"
        if self.shortest_word is not None and not 1 <= self.shortest_word <= self.length:
            return f"shortest_word = {self.shortest_word}: must be between 1 and length = {self.length}"
        return None

    def draw(self, draws: Draws, length: int, side: Side) -> Samples:
        table = product_table(self.group)
        tokens = draws.integers(len(table), self.length)
        targets = np.empty_like(tokens)
        state = np.zeros(draws.count, np.int64)
        for t in range(self.length):
            targets[:, t] = state = table[state, tokens[:, t]]
        scored = np.ones(tokens.shape, bool)
        if self.shortest_word is None:
            return Samples(tokens, targets, scored)
        lengths = self.shortest_word + draws.integers(self.length - self.shortest_word + 1)
        return Samples(tokens, targets, scored, lengths)


@dataclass(frozen=True, kw_only=True)
class RunningParity(WordProblem):
    """Whether the number of ones so far is odd, at every token: the word problem of Z2.

    Published: words of 3 to 40 tokens, tests of 40 to 256 (`shortest_word=40,length=256`; Grazzi et al. 2025,
    arXiv:2411.12537). `parity` asks once, at the end.
    """

    length: int = 40
    group: str = "Z2"
    shortest_word: int | None = 3


@dataclass(frozen=True, kw_only=True)
class ModularAddition(WordProblem):
    """The sum so far modulo 5, at every token: the word problem of Z5. Another modulus m: `group=Zm`.

    Published: modulo 5, words of up to 40 tokens, tests of up to 256 or 500 (the regular tasks of Deletang et al. 2023,
    arXiv:2207.02098, whose modular arithmetic also subtracts and multiplies, and asks once).
    """

    length: int = 40
    group: str = "Z5"
    shortest_word: int | None = 3


@functools.cache
def product_table(group: str) -> np.ndarray:
    """int16 (n, n): number of the product of elements i and j. Raises ValueError for what is no group of Z, S and A."""
    matches = [re.fullmatch(r"([ZSA])([1-9][0-9]{0,3})", factor) for factor in group.split("x")]
    if not all(matches):
        raise ValueError("must be Z, S or A and a number, or a product of such, as in A4xZ5")
    factors = [(match[1], int(match[2])) for match in matches]
    if math.prod(map(_order, factors)) > LARGEST:
        raise ValueError(f"has more than {LARGEST} elements")
    table = np.zeros((1, 1), np.int64)
    for kind, n in factors:
        other = np.add.outer(np.arange(n), np.arange(n)) % n if kind == "Z" else _permutations(n, even=kind == "A")
        # Element (g, h) of a product has number g * |H| + h.
        pairs = table[:, None, :, None] * len(other) + other[None, :, None, :]
        table = pairs.reshape(len(table) * len(other), -1)
    return table.astype(np.int16)


def _order(factor: tuple[str, int]) -> int:
    """Elements of one factor; where they are too many, some number that is too large."""
    kind, n = factor
    return n if kind == "Z" else math.factorial(min(n, 7)) // (2 if kind == "A" and n > 1 else 1)


def _permutations(n: int, even: bool) -> np.ndarray:
    """The table of products of the permutations of n things, or of the even ones, in lexicographic order."""
    elements = np.array(list(itertools.permutations(range(n))))
    if even:
        i, j = np.triu_indices(n, 1)
        elements = elements[(elements[:, i] > elements[:, j]).sum(axis=1) % 2 == 0]
    digits = n ** np.arange(n)[::-1]  # as numbers of base n, the elements ascend
    products = elements[:, elements]  # [p, q, i] = p(q(i))
    return np.searchsorted(elements @ digits, products @ digits)
