"""How tensors of other houses become parameters of slm.models, and back, bit for bit.

A family is a table of links. A link is one of their tensors and the parameters that it holds: one, or several that they
fused. Paths are relative: in a layer to its block (`mixer/query/kernel`), outside to the tree (`embed/embedding`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, ...]
Shapes = Sequence[tuple[int, ...]]


class Link(NamedTuple):
    """One of their tensors and its parameters here."""

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[np.ndarray, Shapes], Arrays]
    """(their tensor, shapes of the parameters) -> the parameters, as views where possible."""
    join: Callable[[Arrays], np.ndarray]
    """Inverse of split."""


def same(theirs: str, ours: str) -> Link:
    """A tensor stored alike: embeddings, vectors, and the matrices of GPT-2."""
    return Link(theirs, (ours,), lambda x, shapes: (x,), lambda parts: parts[0])


def flat(theirs: str, ours: str) -> Link:
    """A vector whose parameter has an axis for the heads."""
    return Link(theirs, (ours,), lambda x, shapes: (x.reshape(shapes[0]),), lambda parts: parts[0].reshape(-1))


def linear(theirs: str, ours: str) -> tuple[Link, Link]:
    """torch.nn.Linear, whose weight is (out, in), and its bias, if it has one."""
    weight = Link(f"{theirs}.weight", (f"{ours}/kernel",), lambda x, shapes: (x.T,), lambda parts: parts[0].T)
    return weight, same(f"{theirs}.bias", f"{ours}/bias")


def fused(theirs: str, *ours: str) -> tuple[Link, Link]:
    """One torch.nn.Linear for several projections, one after the other."""

    def rows(x, shapes):
        return tuple(part.T for part in _cut(x, [shape[-1] for shape in shapes]))

    return (
        Link(f"{theirs}.weight", _leaves(ours, "kernel"), rows, lambda parts: np.concatenate([p.T for p in parts])),
        Link(f"{theirs}.bias", _leaves(ours, "bias"), _vectors, np.concatenate),
    )


def fused_columns(theirs: str, *ours: str) -> tuple[Link, Link]:
    """Several projections one after the other in an (in, out) matrix, as GPT-2's Conv1D has it."""

    def columns(x, shapes):
        return tuple(part.T for part in _cut(x.T, [shape[-1] for shape in shapes]))

    return (
        Link(f"{theirs}.weight", _leaves(ours, "kernel"), columns, lambda parts: np.concatenate(parts, 1)),
        Link(f"{theirs}.bias", _leaves(ours, "bias"), _vectors, np.concatenate),
    )


def by_head(theirs: str, heads: int, *ours: str) -> tuple[Link, Link]:
    """One torch.nn.Linear for several projections, which take turns from head to head, or from group to group."""

    def split(x, shapes):
        sizes = [shape[-1] // heads for shape in shapes]
        if heads * sum(sizes) != x.shape[0]:
            raise ValueError(f"{x.shape[0]} rows for {heads} heads of {' + '.join(map(str, sizes))}")
        parts = np.split(x.reshape(heads, -1, *x.shape[1:]), np.cumsum(sizes)[:-1], axis=1)
        return tuple(part.reshape(-1, *x.shape[1:]).T for part in parts)

    def join(parts):
        rows = [part.T.reshape(heads, -1, *part.shape[:-1]) for part in parts]
        return np.concatenate(rows, 1).reshape(-1, *parts[0].shape[:-1])

    return (
        Link(f"{theirs}.weight", _leaves(ours, "kernel"), split, join),
        Link(f"{theirs}.bias", _leaves(ours, "bias"), split, join),
    )


def conv(theirs: str, *ours: str) -> tuple[Link, Link]:
    """One depthwise torch.nn.Conv1d, (channels, 1, width), over the channels of several."""

    def split(x, shapes):
        return tuple(part[:, 0].T for part in _cut(x, [shape[-1] for shape in shapes]))

    return (
        Link(
            f"{theirs}.weight",
            _leaves(ours, "kernel"),
            split,
            lambda parts: np.concatenate([p.T[:, None] for p in parts]),
        ),
        Link(f"{theirs}.bias", _leaves(ours, "bias"), _vectors, np.concatenate),
    )


def norm(theirs: str, ours: str) -> tuple[Link, Link]:
    """A norm's weight and, of LayerNorm, its bias."""
    return same(f"{theirs}.weight", f"{ours}/scale"), same(f"{theirs}.bias", f"{ours}/bias")


def _leaves(ours: tuple[str, ...], leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}/{leaf}" for path in ours)


def _vectors(x, shapes):
    return tuple(_cut(x, [shape[0] for shape in shapes]))


def _cut(x: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    if sum(sizes) != x.shape[0]:
        raise ValueError(f"{x.shape[0]} rows for projections of {' + '.join(map(str, sizes))}")
    return np.split(x, np.cumsum(sizes)[:-1])
