"""How well linear, sparse and low-rank attention approximate exact softmax attention on given queries and keys.

The rows of weights of any mechanism that is linear in v come out of its public function when v is the identity: it is
the shipped code that is measured, not a copy of it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm.attention import features as maps
from slm.attention import (
    indexed_attention,
    linear_attention,
    linformer_attention,
    moba_attention,
    nsa_attention,
    nystrom_attention,
    softmax_attention,
    sparse_attention,
)
from slm.attention.nsa import FORCED
from slm.attention.patterns import causal, global_tokens, local_blocks, random_blocks
from slm.study.scores import entropy, exact_rows

SINKS = 4
"""First tokens that `sinks` keeps (StreamingLLM)."""


class Approximation(NamedTuple):
    """One mechanism at one budget."""

    family: str
    size: int
    """M features, keys of a window, keys of chosen blocks, L landmarks: what the family is turned up by."""
    read: float
    """Floats that a late query of one head has to read: keys and values that it looks at (and what it chooses them by),
    or the recurrent state. Decoding is bound by it, and it is the one unit that all families have."""
    state: float
    """Floats that decoding carries for one head after T tokens."""
    attend: Callable[..., jax.Array]
    """(key, q, k, v) -> (B, T, H, V), linear in v; the random key is for what it draws."""
    causal: bool = True


def approximations(T: int, K: int, families: Sequence[str] | None = None) -> list[Approximation]:
    """Approximations of causal attention over T tokens with heads of size K = V, by family from cheap to dear; two
    families are bidirectional, which `causal` tells.

    `uniform`: the mean of all values so far; what does no better has learned nothing from q and k.
    `elu1`, `relu`, `dpfp`, `hedgehog` (identity for its learned map), `cosformer`: one size each. `performer` by M.
      `taylor2` by d': K, or q and k projected to fewer dimensions by the singular vectors of q k^T of the very
      sequence: no learned projection, which Based has, could keep more of the scores.
    `window` by W; `sinks`: the first `SINKS` keys and a window, W in all. (Longformer's pattern, if causal, is that.)
    `bigbird`: local, global and random blocks of T / 32, by the number of random ones.
    `moba` and `nsa` (its selected branch alone) with blocks of T / 32, by the keys in the chosen ones.
    `top`: the keys with the highest scores, by their number: DeepSeek's sparse attention with q and k as its indexer.
      A bound for whatever chooses keys: the choice is not counted in `read`.
    `linformer` with Gaussian projections, `linformer_means` with means of segments, `nystrom`: bidirectional, by L.

    Raises:
      ValueError: 32 does not divide T, or no such family.
    """
    if T % 32:
        raise ValueError(f"T = {T}: must be a multiple of 32, the number of blocks")
    if families is not None and (unknown := set(families) - set(FAMILIES)):
        raise ValueError(f"no family {', '.join(sorted(unknown))}: must be of {', '.join(FAMILIES)}")
    block, exact, per_key, means = T // 32, 2 * T * K, 2 * K, 32 * K
    fractions = (32, 16, 8, 4, 2, 1)
    found = []

    def add(family, size, read, state, attend, causal=True):
        if families is None or family in families:
            found.append(Approximation(family, size, read, state, jax.jit(attend), causal))

    def add_map(family, M, attend):
        add(family, M, M * (K + 1), M * (K + 1), attend)

    add_map("uniform", 1, _given(linear_attention, feature_map=lambda x: jnp.ones_like(x[..., :1])))
    for name, M in (("elu1", K), ("relu", K), ("dpfp", 2 * K), ("hedgehog", 2 * K)):
        add_map(name, M, _given(linear_attention, feature_map=name))
    add_map("cosformer", 2 * K, _given(_cosformer))
    for M in (16, 64, 256, 1024):
        add_map("performer", M, functools.partial(_performer, M=M))
    for d in (K // 4, K // 2, K):
        add_map("taylor2", 1 + d + d * (d + 1) // 2, _given(_taylor2, d=d))
    for W in (T // f for f in fractions):
        add("window", W, W * per_key, W * per_key, _given(softmax_attention, window=W))
        if W > SINKS:
            add("sinks", W, W * per_key, W * per_key, _given(softmax_attention, window=W - SINKS, sinks=SINKS))
    for n in (1, 3, 7, 15):
        pattern = causal & (local_blocks(block, 1) | global_tokens(block) | random_blocks(n, block))
        seen = float(pattern(np.arange(T // 2, T)[:, None], np.arange(T)).sum(1).mean())
        add("bigbird", n, seen * per_key, exact, _given(sparse_attention, pattern=pattern))
    for n in (1, 2, 4, 8, 16):
        keys, read = n * block, n * block * per_key + means
        add("moba", keys, read, exact + means, _given(moba_attention, block_size=block, top_k=n))
        if n >= FORCED:
            add("nsa", keys, read, exact + means, _given(_nsa_selection, block_size=block, top_k=n))
    for n in (T // f for f in fractions if f > 1):
        add("top", n, n * per_key, exact, _given(_top, n=n))
    for L in (T // f for f in fractions if f > 1):
        add("linformer", L, L * per_key, L * per_key, functools.partial(_linformer, L=L), False)
        add("linformer_means", L, L * per_key, L * per_key, _given(_linformer_means, L=L), False)
        add("nystrom", L, L * per_key, L * per_key, _given(nystrom_attention, landmarks=L), False)
    return found


def _given(attend, **options):
    """attend(q, k, v, **options), which draws nothing, as a function of (key, q, k, v)."""
    return lambda key, q, k, v: attend(q, k, v, **options)


def _performer(key, q, k, v, M):
    K = q.shape[-1]
    w = maps.random_features(key, K, M)
    phi = tuple(lambda x, f=f: f(x * K**-0.25, w) for f in (maps.favor_queries, maps.favor_keys))
    return linear_attention(q, k, v, feature_map=phi)


def _cosformer(q, k, v):
    B, T = q.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return linear_attention(q, k, v, feature_map=lambda x: maps.cosformer(x, positions, T))


def _taylor2(q, k, v, d):
    K = q.shape[-1]
    if d < K:
        (q_basis, q_parts), (k_basis, k_parts) = (jnp.linalg.qr(jnp.swapaxes(x, 1, 2)) for x in (q, k))
        left, sizes, right = jnp.linalg.svd(q_parts @ jnp.swapaxes(k_parts, -1, -2))
        root = jnp.sqrt(sizes[..., None, :d])
        q, k = q_basis @ (left[..., :d] * root), k_basis @ (jnp.swapaxes(right, -1, -2)[..., :d] * root)
        q, k = (jnp.swapaxes(x, 1, 2) for x in (q, k))
    return linear_attention(q, k, v, feature_map="taylor2", scale=K**-0.5)


def _nsa_selection(q, k, v, block_size, top_k):
    gates = jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0]), (*q.shape[:3], 3))
    return nsa_attention(q, k, v, gates, block_size=block_size, top_k=top_k, window=1)


def _top(q, k, v, n):
    B, T, H, _ = q.shape
    # All heads of a layer share the indexer's choice; each has its own here.
    q1, k1, v1 = (jnp.swapaxes(x, 1, 2).reshape(B * H, T, 1, -1) for x in (q, k, v))
    # A constant makes the indexer's scores positive, which its relu would else tie at 0.
    lengths_q, lengths_k = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q1, k1))
    index_q = jnp.concatenate([q1, lengths_q * lengths_k.max(1, keepdims=True)], -1)
    index_k = jnp.concatenate([k1, jnp.ones_like(lengths_k)], -1)[:, :, 0]
    out, _ = indexed_attention(q1, k1, v1, index_q, index_k, jnp.ones((B * H, T, 1)), top_k=n)
    return jnp.swapaxes(out.reshape(B, H, T, -1), 1, 2)


def _linformer(key, q, k, v, L):
    e = jax.random.normal(key, (L, q.shape[1])) * L**-0.5
    return linformer_attention(q, k, v, e, e)


def _linformer_means(q, k, v, L):
    T = q.shape[1]
    e = jnp.asarray((np.arange(T) * L // T == np.arange(L)[:, None]) * (L / T), jnp.float32)
    return linformer_attention(q, k, v, e, e)


def compare(
    q, k, v, approximations: Sequence[Approximation], *, seed: int = 0, first_query: int | None = None
) -> list[dict[str, Any]]:
    """Each approximation against softmax(q k^T / sqrt K) v in float64, causal where the approximation is.

    Args:
      q, k, v: (B, T, H, K); each sequence gets random draws of its own.
      approximations: such as those of `approximations`, made for T and K.
      seed: of the random draws.
      first_query: earlier queries are left out, because they see less than any budget; None: T / 2, and 0 where the
        approximation is bidirectional.

    Returns:
      A dict for each approximation: `family`, `size`, `read`, `state`, `share` (read over 2 T K, which exact attention
      reads), and as mean over the sequences, with the standard error over them as `..._stderr` (NaN for one sequence):
      `output_error`  Frobenius norm of the outputs' difference over that of the exact outputs, mean over heads
      `top1`          share of queries whose largest weight is on the same key (queries without any weight: not)
      `kl`, `reverse_kl`  KL(exact || approximate) and KL(approximate || exact) of rows of weights, in nats
      `entropy`       of the approximate rows, in nats
      `proper`        share of rows that are distributions: no weight below -1e-6, sum within 1e-3 of 1. `entropy` and
                      `reverse_kl` are means over these, NaN if there is none. -log of the exact weight on the seen keys
                      is the `reverse_kl` of what masks keys.
      `covering`      share of rows that, besides, have weight wherever exact ones have more than 1e-9: `kl` is the mean
                      over these, and infinite for all others. Masks cover nothing.
    """
    T = q.shape[1]
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    # Outputs and rows of weights from one call: the identity's columns are the weights of each key.
    identity = jnp.broadcast_to(jnp.eye(T)[None, :, None], (*v.shape[:3], T))
    values = jnp.concatenate([v, identity], -1)
    exact = {}
    for way in {approximation.causal for approximation in approximations}:
        start = 0 if not way else T // 2 if first_query is None else first_query
        exact[way] = start, exact_rows(q, k, way)[0][:, :, start:]
    keys = jax.random.split(jax.random.key(seed), len(q))
    table = []
    for approximation in approximations:
        start, rows = exact[approximation.causal]
        samples = []
        for b in range(len(q)):
            out = approximation.attend(keys[b], *(x[b : b + 1] for x in (q, k, values)))
            out = np.moveaxis(np.asarray(out[0, start:], np.float64), 1, 0)
            samples.append(_scores(rows[b], out, np.moveaxis(np.asarray(v[b], np.float64), 1, 0)))
        row: dict[str, Any] = {name: getattr(approximation, name) for name in ("family", "size", "read", "state")}
        row["share"] = approximation.read / (2 * T * q.shape[-1])
        for name in samples[0]:
            sample = np.array([scores[name] for scores in samples])
            row[name] = float(sample.mean())
            row[f"{name}_stderr"] = float(sample.std(ddof=1) / math.sqrt(len(sample))) if len(sample) > 1 else math.nan
        table.append(row)
    return table


def _scores(exact_HxTxS, out_HxTxV, v_HxSxV) -> dict[str, float]:
    """What `compare` returns for one sequence; `out` has the approximate rows behind the outputs."""
    V = v_HxSxV.shape[-1]
    wanted, got, rows = exact_HxTxS @ v_HxSxV, out_HxTxV[..., :V], out_HxTxV[..., V:]
    difference, size = (np.linalg.norm(x, axis=(-2, -1)) for x in (got - wanted, wanted))
    proper = (rows.min(-1) >= -1e-6) & (np.abs(rows.sum(-1) - 1) < 1e-3)
    positive = np.maximum(rows, 0)
    covering = proper & ~((rows <= 0) & (exact_HxTxS > 1e-9)).any(-1)
    same = (rows.argmax(-1) == exact_HxTxS.argmax(-1)) & (rows.max(-1) > 0)
    return {
        "output_error": (difference / size).mean(),
        "top1": same.mean(),
        "kl": _mean(_divergence(exact_HxTxS, positive), covering),
        "reverse_kl": _mean(_divergence(positive, exact_HxTxS), proper),
        "entropy": _mean(entropy(positive), proper),
        "proper": proper.mean(),
        "covering": covering.mean(),
    }


def _divergence(p, q):
    """Sum of p log(p / q) over the keys where p and q are above 0."""
    both = (p > 0) & (q > 0)
    return np.where(both, p * (np.log(np.where(both, p, 1)) - np.log(np.where(both, q, 1))), 0).sum(-1)


def _mean(values, where) -> float:
    return float(values[where].mean()) if where.any() else math.nan


FAMILIES: dict[str, tuple[str, str, str]] = {
    "uniform": ("uniform weights", "#000000", ":"),
    "elu1": ("elu + 1", "#d62728", "s"),
    "relu": ("ReLU", "#d62728", "v"),
    "dpfp": ("DPFP", "#d62728", "P"),
    "hedgehog": ("Hedgehog (untrained)", "#d62728", "D"),
    "cosformer": ("cosFormer", "#d62728", "X"),
    "performer": ("Performer, by M", "#ff7f0e", "o-"),
    "taylor2": ("Taylor 2, by d'", "#8c564b", "o-"),
    "window": ("window", "#1f77b4", "o-"),
    "sinks": ("4 sinks + window", "#6baed6", "o--"),
    "bigbird": ("BigBird", "#9467bd", "o-"),
    "moba": ("MoBA", "#2ca02c", "o-"),
    "nsa": ("NSA's selection", "#17603a", "^--"),
    "top": ("largest scores (bound)", "#000000", "o-"),
    "linformer": ("Linformer, random *", "#bbbbbb", "o:"),
    "linformer_means": ("Linformer, means *", "#999999", "^:"),
    "nystrom": ("Nystromformer *", "#555555", "s:"),
}
"""Family to label, colour and line of `plot`."""


def plot(tables: dict[str, list[dict]], path) -> None:
    """Error against budget: a row of axes for each table of `compare`, by its title; a line for each family.

    Points without any error are left out, and divergences where less than 99% of the rows are distributions.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = (
        ("output_error", "relative output error", "log", (0.02, 10)),
        ("reverse_kl", "KL(approximate || exact), nats", "log", (0.002, 10)),
        ("top1", "top-1 agreement", "linear", (-0.03, 1.03)),
    )
    shares = {1 / 32: "1/32", 1 / 8: "1/8", 1 / 2: "1/2", 1: "1", 4: "4"}
    figure, grid = plt.subplots(len(tables), 3, figsize=(13, 0.6 + 2.9 * len(tables)), sharex=True, squeeze=False)
    for axes, (title, table) in zip(grid, tables.items()):
        for axis, (quantity, _, scale, limits) in zip(axes, columns):
            for family, (label, colour, line) in FAMILIES.items():
                rows = [row for row in table if row["family"] == family and row["output_error"] > 1e-5]
                if quantity == "reverse_kl":
                    rows = [row for row in rows if row["proper"] >= 0.99]
                x, y = [row["share"] for row in rows], [row[quantity] for row in rows]
                if family == "uniform" and rows:
                    axis.axhline(y[0], color=colour, ls=line, lw=1, label=label)
                else:
                    axis.plot(x, y, line, color=colour, label=label, ms=4, lw=1.3)
            axis.set(xscale="log", yscale=scale, ylim=limits, xlim=(0.02, 6))
            axis.set_xticks(list(shares), list(shares.values()))
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(title, fontweight="bold")
    for axis, (_, name, _, _) in zip(grid[0], columns):
        axis.set_title(name, fontsize=11)
    figure.supxlabel("floats read per decoded token, over those of exact attention", fontsize=10)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="center right", frameon=False, title="* bidirectional")
    figure.tight_layout(rect=(0, 0, 0.84, 1))
    figure.savefig(path, dpi=70, pil_kwargs={"optimize": True})
    plt.close(figure)
