"""Masks as small functions of positions that compose: which key position j does query position i see?

    causal & (window(128) | global_tokens(4))

A pattern is called on integer arrays of positions (numpy or traced) that broadcast, and answers elementwise; it never
needs the length. `&`, `|`, `~` join patterns. Patterns compare and hash by value, so that they can be static arguments
of jit, and their repr is read back by `parse`. All of them look both ways; `causal &` keeps the past.
"""

import ast
import dataclasses
import difflib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np


class Pattern:
    """What all patterns can do; see the module."""

    def __call__(self, i, j):
        raise NotImplementedError

    def __and__(self, other):
        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other):
        return Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self):
        return Not(self)


@dataclasses.dataclass(frozen=True, repr=False)
class And(Pattern):
    one: Pattern
    other: Pattern

    def __call__(self, i, j):
        return self.one(i, j) & self.other(i, j)

    def __repr__(self):
        # Python groups a & b & c to the left.
        return f"{_inside(self.one, Or)} & {_inside(self.other, Or, And)}"


@dataclasses.dataclass(frozen=True, repr=False)
class Or(Pattern):
    one: Pattern
    other: Pattern

    def __call__(self, i, j):
        return self.one(i, j) | self.other(i, j)

    def __repr__(self):
        return f"{self.one!r} | {_inside(self.other, Or)}"


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Pattern):
    one: Pattern

    def __call__(self, i, j):
        return self.one(i, j) ^ True

    def __repr__(self):
        return f"~{_inside(self.one, Or, And)}"


@dataclasses.dataclass(frozen=True, repr=False)
class Named(Pattern):
    """One of the patterns below."""

    name: str
    sizes: tuple[int, ...] = ()

    def __call__(self, i, j):
        return _MASKS[self.name](i, j, *self.sizes)

    def __repr__(self):
        return f"{self.name}({', '.join(map(str, self.sizes))})" if self.sizes else self.name


@dataclasses.dataclass(frozen=True, repr=False)
class Explicit(Pattern):
    """A boolean array (T, T), [query, key]; beyond T its last row and column go on."""

    length: int
    bits: bytes

    @classmethod
    def of(cls, mask) -> "Explicit":
        """Raises ValueError if `mask` is no boolean (T, T) array with known values."""
        try:
            mask = np.asarray(mask)
        except jax.errors.TracerArrayConversionError:
            raise ValueError(
                "a pattern decides which blocks are computed, so it must be known before tracing: got a traced array; "
                "make it of numpy, outside jit"
            ) from None
        if mask.dtype != bool or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
            raise ValueError(
                f"pattern: expected a mask function of slm.attention.patterns or a boolean (T, T) array, "
                f"got {mask.dtype} {mask.shape}"
            )
        return cls(len(mask), np.packbits(mask).tobytes())

    def __call__(self, i, j):
        xp = jnp if isinstance(i, jax.Array) or isinstance(j, jax.Array) else np
        return xp.asarray(self.array)[xp.minimum(i, self.length - 1), xp.minimum(j, self.length - 1)]

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The (T, T) booleans."""
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.length**2)
        return bits.astype(bool).reshape(self.length, self.length)

    def __repr__(self):
        return f"<boolean array ({self.length}, {self.length})>"


def _inside(pattern: Pattern, *loose: type) -> str:
    return f"({pattern!r})" if isinstance(pattern, loose) else repr(pattern)


causal = Named("causal")
"""j <= i."""

full = Named("full")
"""Everything."""


def window(W: int) -> Pattern:
    """|i - j| < W: W counts the query; `causal & window(W)` is the window of `softmax_attention`."""
    return _named("window", W=W)


def dilated(W: int, d: int) -> Pattern:
    """A window of W keys to each side with gaps of d - 1 between them (Longformer, Beltagy et al. 2020, section 3.1):
    |i - j| < W d and d divides i - j."""
    return _named("dilated", W=W, d=d)


def strided(s: int) -> Pattern:
    """The last s and every s-th before (Sparse Transformer, Child et al. 2019, section 4.3, both heads in one):
    |i - j| < s or s divides i - j."""
    return _named("strided", s=s)


def fixed(s: int, c: int) -> Pattern:
    """The own stretch of s positions, and the last c of every stretch (Sparse Transformer, Child et al. 2019,
    section 4.3, both heads in one): i // s == j // s or j mod s >= s - c.

    Raises ValueError if c > s.
    """
    if isinstance(c, int) and isinstance(s, int) and c > s:
        raise ValueError(f"fixed({s}, {c}): c = {c} of every s = {s} positions cannot be; c must be at most s")
    return _named("fixed", s=s, c=c)


def global_tokens(n: int) -> Pattern:
    """The first n positions are seen by all and see all: i < n or j < n (Longformer, Beltagy et al. 2020)."""
    return _named("global_tokens", n=n)


def random_blocks(n: int, block: int, seed: int = 0) -> Pattern:
    """Each block of positions sees n blocks before it (all, where they are fewer), drawn uniformly without repetition,
    and is seen back (BigBird, Zaheer et al. 2020): an undirected random graph, of which `causal &` keeps the n.

    Drawn by hashing (seed, block): the same for every length, so that decoding and training agree.
    """
    return _named("random_blocks", seed=seed, n=n, block=block, order=("n", "block", "seed"))


def local_blocks(C: int, back: int) -> Pattern:
    """The own block of C positions and the `back` blocks on each side: |i // C - j // C| <= back."""
    return _named("local_blocks", back=back, C=C, order=("C", "back"))


def chunked(C: int) -> Pattern:
    """The own chunk of C positions: i // C == j // C (Llama 4)."""
    return _named("chunked", C=C)


def _named(name, order=None, **sizes) -> Named:
    for key, value in sizes.items():
        least = 0 if key in ("seed", "back") else 1
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}: {key} = {value!r} must be an integer of at least {least}")
    return Named(name, tuple(int(sizes[key]) for key in order or sizes))


def _random(i, j, n, block, seed):
    xp = jnp if isinstance(i, jax.Array) or isinstance(j, jax.Array) else np
    a, b = (xp.asarray(x) // block for x in (i, j))
    return _drawn(a, b, n, seed) | _drawn(b, a, n, seed)


def _drawn(a, b, n, seed):
    """Whether b is one of min(n, a) different numbers below a, elementwise: Floyd's sampling with hashes for dice."""
    xp = jnp if isinstance(a, jax.Array) else np
    picks, seen = [], False
    for step in range(n):
        top = a - n + step
        die = _hash(xp, a, step, seed) % xp.maximum(top + 1, 1).astype(xp.uint32)
        pick = die.astype(a.dtype)
        for other in picks:
            pick = xp.where(die == other, top, pick)  # `top` was out of reach before
        picks.append(xp.where(top < 0, -1, pick))
        seen |= b == picks[-1]
    return seen


def _hash(xp, a, step, seed):
    """32 bits of three integers: the finaliser of MurmurHash3."""
    salt = (seed * 0x9E3779B9 + step * 0x7F4A7C15 + 0x165667B1) & 0xFFFFFFFF
    with np.errstate(over="ignore"):
        x = a.astype(xp.uint32) * np.uint32(0x9E3779B1) ^ np.uint32(salt)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))


_MASKS = {
    "causal": lambda i, j: j <= i,
    "full": lambda i, j: abs(i - j) >= 0,
    "window": lambda i, j, W: abs(i - j) < W,
    "dilated": lambda i, j, W, d: (abs(i - j) < W * d) & ((i - j) % d == 0),
    "strided": lambda i, j, s: (abs(i - j) < s) | ((i - j) % s == 0),
    "fixed": lambda i, j, s, c: (i // s == j // s) | (j % s >= s - c),
    "global_tokens": lambda i, j, n: (i < n) | (j < n),
    "random_blocks": _random,
    "local_blocks": lambda i, j, C, back: abs(i // C - j // C) <= back,
    "chunked": lambda i, j, C: i // C == j // C,
}
_MAKERS = {
    maker.__name__: maker
    for maker in (window, dilated, strided, fixed, global_tokens, random_blocks, local_blocks, chunked)
}
_CONSTANTS = {"causal": causal, "full": full}


def parse(text: str) -> Pattern:
    """The pattern that `text` spells: names and whole numbers above, `&`, `|`, `~` and parentheses, nothing else.

    Raises ValueError naming what it does not know, with the nearest name, or what is wrong with a number.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"pattern {text!r} cannot be read: {error.msg}") from None
    return _read(tree, text)


def _read(node: ast.expr, text: str) -> Pattern:
    match node:
        case ast.BinOp(op=ast.BitAnd()):
            return _read(node.left, text) & _read(node.right, text)
        case ast.BinOp(op=ast.BitOr()):
            return _read(node.left, text) | _read(node.right, text)
        case ast.UnaryOp(op=ast.Invert()):
            return ~_read(node.operand, text)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Call(func=ast.Name(id=name)) if name in _MAKERS:
            return _make(name, node, text)
        case ast.Name(id=name) if name in _MAKERS:
            raise ValueError(f"pattern {text!r}: {name} needs numbers: {name}{inspect.signature(_MAKERS[name])}")
        case ast.Call(func=ast.Name(id=name)) if name in _CONSTANTS:
            raise ValueError(f"pattern {text!r}: {name} takes no numbers: write it without parentheses")
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            names = [*_CONSTANTS, *_MAKERS]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
            raise ValueError(f"pattern {text!r}: no mask is called {name!r}: {hint}")
    raise ValueError(f"pattern {text!r}: {ast.unparse(node)!r} is neither a mask nor one of & | ~ between masks")


def _make(name: str, call: ast.Call, text: str) -> Pattern:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    if not all(isinstance(value, ast.Constant) and type(value.value) is int for value in values):
        raise ValueError(f"pattern {text!r}: {ast.unparse(call)} must have whole numbers, nothing else")
    try:
        positional = [value.value for value in call.args]
        return _MAKERS[name](*positional, **{keyword.arg: keyword.value.value for keyword in call.keywords})
    except TypeError:
        signature = f"{name}({', '.join(inspect.signature(_MAKERS[name]).parameters)})"
        raise ValueError(f"pattern {text!r}: {ast.unparse(call)} should be {signature}") from None
    except ValueError as error:
        raise ValueError(f"pattern {text!r}: {error}") from None


def reach(pattern: Pattern) -> tuple[int, int] | None:
    """(n, W) such that the past keys that `pattern` sees are among the first n and the window W; None if it has none.

    It bounds what decoding has to keep: n + W keys.
    """
    match pattern:
        case And():
            bounds = [bound for bound in (reach(pattern.one), reach(pattern.other)) if bound]
            return min(bounds, key=sum, default=None)
        case Or():
            bounds = reach(pattern.one), reach(pattern.other)
            return tuple(map(max, *bounds)) if all(bounds) else None
        case Named(name="window" | "chunked", sizes=(W,)):
            return 0, W
        case Named(name="dilated", sizes=(W, d)):
            return 0, (W - 1) * d + 1
        case Named(name="local_blocks", sizes=(C, back)):
            return 0, C * (back + 1)
        case Named(name="global_tokens", sizes=(n,)):
            return n, 0
    return None
