"""The fast solver, which goes in blocks with one Cholesky factor, against surgery one input at a time in float64 with
the inverse Hessian of what is still free (Optimal Brain Surgeon, Hassibi & Stork 1993)."""

import numpy as np
import pytest

from slm.compress.schemes import Scheme
from slm.compress.second_order import factor, gptq, sparsegpt
from slm.errors import ConfigError


class Grid:
    """Integers from 0 to 15 between the least and the largest of a group; scales of groups are in half precision."""

    def __init__(self, group):
        self.group, self.scheme = group, Scheme("int4", group, symmetric=False)

    def fit(self, w):
        kind = np.float16 if self.group else np.float32
        return ((w.max(0) - w.min(0)) / 15).astype(kind).astype(np.float64), w.min(0).astype(kind).astype(np.float64)

    def snap(self, w, scale, zero):
        return np.round(((w - zero) / scale).clip(0, 15)) * scale + zero


def problem(inputs, outputs, samples=700, seed=0):
    """Correlated inputs, (kernel, gram) in float32."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, inputs)) @ (np.eye(inputs) + 1.5 * rng.normal(size=(inputs, inputs)) / inputs**0.5)
    x *= rng.uniform(0.3, 2, inputs)
    return rng.normal(size=(inputs, outputs)).astype(np.float32), (x.T @ x).astype(np.float32)


def surgery(kernel, gram, new_row, begin, size, damping=0.01):
    """Naive form: new_row(what begin decided, i, w) after begin(rows, diagonal of H^-1's factor) at each group."""
    w, H = kernel.astype(np.float64), gram.astype(np.float64)
    H = H + damping * np.diag(H).mean() * np.eye(len(H))
    left = [np.linalg.inv(H)]  # inverse Hessians of what is free when input i is changed (GPTQ, equation 3)
    for _ in range(len(H) - 1):
        one = left[-1]
        left.append(one[1:, 1:] - one[1:, :1] * one[:1, 1:] / one[0, 0])
    for i in range(len(w)):
        if i % size == 0:
            to = min(i + size, len(w))
            decided = begin(w[i:to], np.array([left[j][0, 0] for j in range(i, to)]) ** 0.5)
        error = (w[i] - new_row(decided, i % size, w[i])) / left[i][0, 0]
        w[i:] -= left[i][:, :1] * error
    return w


def kept_unstructured(sparsity):
    def begin(rows, d):
        cost = (rows**2 / d[:, None] ** 2).reshape(-1)
        kept = np.ones(cost.size, bool)
        kept[np.argsort(cost)[: round(sparsity * cost.size)]] = False
        return kept.reshape(rows.shape)

    return begin


def kept_n_of_m(n):
    def begin(rows, d):
        cost = rows**2 / d[:, None] ** 2
        kept = np.zeros(rows.shape, bool)
        for column, best in enumerate(np.argsort(-cost, 0)[:n].T):
            kept[best, column] = True
        return kept

    return begin


def drop(kept, i, w):
    return w * kept[i]


@pytest.mark.parametrize("inputs", [40, 128, 300])
def test_half_of_the_weights_go_as_in_surgery_one_by_one(inputs):
    kernel, gram = problem(inputs, 24)
    # The fast form decides about 128 inputs at a time, with what is free at each one's turn on the diagonal.
    wanted = surgery(kernel, gram, drop, kept_unstructured(0.5), 128)
    found = np.asarray(sparsegpt(kernel, gram, 0.5))
    assert ((found == 0) == (abs(wanted) < 1e-9)).all()
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_go_as_in_surgery_one_by_one(pattern, n, m):
    kernel, gram = problem(200, 16)
    wanted = surgery(kernel, gram, drop, kept_n_of_m(n), m)
    found = np.asarray(sparsegpt(kernel, gram, 0.0, pattern))
    assert ((found.reshape(-1, m, 16) != 0).sum(1) == n).all()
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("group", [8, 64, 96, None])
def test_rounding_goes_as_in_surgery_one_by_one(group):
    kernel, gram = problem(192, 12)
    grid = Grid(group)
    whole = grid.fit(kernel.astype(np.float64))
    wanted = surgery(
        kernel, gram, lambda d, i, w: grid.snap(w, *d),
        (lambda rows, d: grid.fit(rows)) if group else lambda rows, d: whole, group or 192,
    )  # fmt: skip
    found, scale, zero = gptq(kernel, gram, grid.scheme)
    assert scale.shape == zero.shape == (192 // (group or 192), 12)
    # A weight halfway between two values may go either way in float32; none does here.
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)
    np.testing.assert_array_equal(grid.scheme.pack(found, scale, zero).astype(np.float32), found)


@pytest.mark.parametrize("group", [32, None])
def test_order_by_energy_keeps_groups_in_place(group):
    kernel, gram = problem(96, 12)
    grid, size = Grid(group), group or 96
    order = np.argsort(-np.diag(gram))
    fitted = [grid.fit(kernel[i : i + size].astype(np.float64)) for i in range(0, 96, size)]
    turn = iter(order)
    wanted = surgery(kernel[order], gram[order][:, order], lambda d, i, w: grid.snap(w, *d),
                     lambda rows, d: fitted[next(turn) // size], 1)[np.argsort(order)]  # fmt: skip
    found, scale, zero = gptq(kernel, gram, grid.scheme, act_order=True)
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)
    np.testing.assert_array_equal(grid.scheme.pack(found, scale, zero).astype(np.float32), found)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "scheme", [Scheme("int8"), Scheme("int4", 32), Scheme("int3", 16), Scheme("nf4"), Scheme("ternary"), Scheme("fp8")]
)
def test_every_grid_is_kept_and_does_better_than_rounding_to_nearest(scheme, act_order):
    kernel, gram = problem(128, 16)
    values, scale, zero = gptq(kernel, gram, scheme, act_order=act_order)
    np.testing.assert_array_equal(scheme.pack(values, scale, zero).astype(np.float32), values)
    assert lost(gram, kernel, np.asarray(values)) < 0.9 * lost(gram, kernel, np.asarray(scheme.fake(kernel)))


def lost(gram, kernel, new):
    """||X W - X W'||^2."""
    return np.einsum("io,ij,jo->", kernel - new, gram.astype(np.float64), kernel - new)


def test_outputs_change_less_than_by_masking_or_rounding_alone():
    kernel, gram = problem(256, 32)
    for pattern in ("unstructured", "2:4"):
        found = np.asarray(sparsegpt(kernel, gram, 0.5, pattern))
        assert lost(gram, kernel, found) < 0.7 * lost(gram, kernel, np.where(found == 0, 0, kernel))
    grid = Grid(64)
    groups = kernel.reshape(4, 64, 32)
    nearest = np.stack([grid.snap(g, *grid.fit(g)) for g in groups]).reshape(kernel.shape)
    assert lost(gram, kernel, np.asarray(gptq(kernel, gram, grid.scheme)[0])) < 0.7 * lost(gram, kernel, nearest)
    ordered = np.asarray(gptq(kernel, gram, grid.scheme, act_order=True)[0])
    assert lost(gram, kernel, ordered) < 0.7 * lost(gram, kernel, nearest)


def test_inputs_that_are_always_zero_do_no_harm():
    kernel, gram = problem(64, 8)
    gram[5] = gram[:, 5] = 0
    kernel[5] = 1000.0
    U = np.asarray(factor(gram))
    damped = gram + np.diag((np.arange(64) == 5) + 0.01 * np.diag(gram).mean())
    np.testing.assert_allclose(U.T @ U @ damped, np.eye(64), atol=1e-3)
    assert not np.any(np.tril(U, -1))
    for found in (sparsegpt(kernel, gram, 0.5), gptq(kernel, gram, Scheme("int4", 32))[0]):
        assert np.isfinite(found).all()
        assert abs(np.asarray(found)).max() < 10


def test_what_does_not_fit_is_refused():
    kernel, gram = problem(30, 4)
    with pytest.raises(ConfigError, match="2:4: 4 does not divide the 30 inputs"):
        sparsegpt(kernel, gram, 0.0, "2:4")
    with pytest.raises(ConfigError, match=r"quantize\.group_size = 8 does not divide the 30 inputs"):
        gptq(kernel, gram, Scheme("int4", 8))
    with pytest.raises(ConfigError, match="'16x16': sparsegpt makes unstructured zeros"):
        sparsegpt(kernel, gram, 0.5, "16x16")
