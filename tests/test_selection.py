"""MoBA, NSA and the token indexer against naive float64 forms, which choose and attend one query at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import indexed_attention, moba_attention, nsa_attention, selection, softmax_attention
from slm.attention.indexer import attach_loss, choose_tokens

B, T, H, K, V = 2, 45, 4, 8, 6
BLOCK, TOP = 4, 4  # 11 blocks and a token
STARTS = ((0, 3, 20, 21), (0, 8))  # of documents: shorter than a block, of one token, with more blocks than are seen


def segments(length=T):
    at = np.arange(length)
    return np.stack([np.searchsorted(starts, at, side="right") for starts in STARTS]).astype(np.int32)


@functools.cache
def inputs(groups=2, length=T, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 10))
    normal = lambda *shape: np.asarray(jax.random.normal(next(keys), (B, length, *shape)))  # noqa: E731
    return {
        "q": normal(H, K) * 2,
        "k": normal(groups, K),
        "v": normal(groups, V),
        "gates": normal(H, 3),
        "index": (normal(3, 5), normal(5), normal(3)),
        "direction": normal(H, V),
    }


# The definitions.


def documents(segment_ids, b, length):
    """First token of each token's document."""
    ids = np.zeros(length, int) if segment_ids is None else segment_ids[b]
    return [next(s for s in range(t, -1, -1) if s == 0 or ids[s - 1] != ids[t]) for t in range(length)]


def attend(query, keys, values, scale):
    logits = scale * keys @ query
    weights = np.exp(logits - logits.max())
    return weights / weights.sum() @ values


def moba_choice(q, k, segment_ids, b, h, t, block, top):
    """Keys that a query sees."""
    g, first = h * k.shape[2] // q.shape[2], documents(segment_ids, b, t + 1)[t]
    own = (t - first) // block
    means = [k[b, first + n * block : first + (n + 1) * block, g].mean(0) for n in range(own)]
    best = sorted(range(own), key=lambda n: -(q[b, t, h] @ means[n]))[: top - 1]
    past = [first + n * block + j for n in sorted(best) for j in range(block)]
    return past + list(range(first + own * block, t + 1))


def naive_moba(q, k, v, segment_ids=None, block=BLOCK, top=TOP, choices=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        seen = moba_choice(*(choices or (q, k)), segment_ids, b, h, t, block, top)
        out[b, t, h] = attend(q[b, t, h], k[b, seen, g], v[b, seen, g], q.shape[3] ** -0.5)
    return out


def naive_nsa(q, k, v, gates, segment_ids=None, block=BLOCK, top=TOP, window=11, compress=None, choices=None):
    q, gates = np.asarray(q, np.float64), np.asarray(gates, np.float64)
    (kc, ks, kw), (vc, vs, vw) = ([np.asarray(x, np.float64) for x in xs] for xs in (k, v))
    scale, R = q.shape[3] ** -0.5, q.shape[2] // ks.shape[2]
    compress = compress or (lambda x: x.mean(0), lambda x: x.mean(0))
    out = np.zeros((*q.shape[:3], vs.shape[3]))

    def probabilities(q, kc, b, t, h, first):
        whole = (t + 1 - first) // block
        keys = [compress[0](kc[b, first + n * block : first + (n + 1) * block, h // R]) for n in range(whole)]
        logits = scale * np.array(keys).reshape(whole, kc.shape[3]) @ q[b, t, h]
        weights = np.exp(logits)
        return weights / weights.sum()

    for b, t, h in np.ndindex(*q.shape[:3]):
        g, first = h // R, documents(segment_ids, b, t + 1)[t]
        p = probabilities(q, kc, b, t, h, first)
        if len(p):
            values = [compress[1](vc[b, first + n * block : first + (n + 1) * block, g]) for n in range(len(p))]
            out[b, t, h] += gates[b, t, h, 0] * (p @ np.array(values))
        own = (t - first) // block
        group = [probabilities(*(choices or (q, kc)), b, t, r, first) for r in range(g * R, (g + 1) * R)]
        forced = [n for n in {0, own - 1} if 0 <= n < own]
        free = sorted(set(range(own)) - set(forced), key=lambda n: -sum(p[n] for p in group))
        chosen = sorted((forced + free)[: top - 1])
        seen = [first + n * block + j for n in chosen for j in range(block)] + list(range(first + own * block, t + 1))
        out[b, t, h] += gates[b, t, h, 1] * attend(q[b, t, h], ks[b, seen, g], vs[b, seen, g], scale)
        near = list(range(max(first, t - window + 1), t + 1))
        out[b, t, h] += gates[b, t, h, 2] * attend(q[b, t, h], kw[b, near, g], vw[b, near, g], scale)
    return out


def naive_indexed(q, k, v, index_q, index_k, index_w, segment_ids=None, top=10, choices=None, target=None):
    """(out, loss of the indexer). `target`: other queries and keys whose attention the indexer is compared with."""
    q, k, v, index_q, index_k, index_w = (np.asarray(x, np.float64) for x in (q, k, v, index_q, index_k, index_w))
    out, loss = np.zeros((*q.shape[:3], v.shape[3])), np.zeros(q.shape[:2])

    def scores(index_q, index_k, index_w, b, t, s):
        return index_w[b, t] @ np.maximum(index_q[b, t] @ index_k[b, s], 0)

    for b, t in np.ndindex(*q.shape[:2]):
        first = documents(segment_ids, b, t + 1)[t]
        chosen_by = choices or (index_q, index_k, index_w)
        seen = sorted(range(first, t + 1), key=lambda s: -scores(*chosen_by, b, t, s))[:top]
        mean = np.zeros(len(seen))
        for h in range(q.shape[2]):
            g = h * k.shape[2] // q.shape[2]
            out[b, t, h] = attend(q[b, t, h], k[b, seen, g], v[b, seen, g], q.shape[3] ** -0.5)
            other_q, other_k = target or (q, k)
            mean += attend(np.float64(other_q[b, t, h]), other_k[b, seen, g], np.eye(len(seen)), q.shape[3] ** -0.5)
        mean /= q.shape[2]
        index = np.array([scores(index_q, index_k, index_w, b, t, s) for s in seen])
        loss[b, t] = mean @ (np.log(mean) - index + np.log(np.exp(index).sum()))
    return out, loss


# The functions under test, compiled once a shape.


@functools.partial(jax.jit, static_argnames=("top", "block", "scale"))
def moba(q, k, v, segment_ids=None, top=TOP, block=BLOCK, scale=None):
    return moba_attention(q, k, v, block_size=block, top_k=top, segment_ids=segment_ids, scale=scale)


@functools.partial(jax.jit, static_argnames=("top", "window"))
def nsa(q, k, v, gates, segment_ids=None, top=TOP, window=11):
    return nsa_attention(q, k, v, gates, block_size=BLOCK, top_k=top, window=window, segment_ids=segment_ids)


@functools.partial(jax.jit, static_argnames=("top", "implementation"))
def indexed(q, k, v, index, segment_ids=None, top=10, implementation="auto"):
    return indexed_attention(q, k, v, *index, top_k=top, segment_ids=segment_ids, implementation=implementation)


def difference(actual, expected):
    """Relative to the largest."""
    assert actual.shape == expected.shape
    assert np.isfinite(np.asarray(actual)).all()
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def branches(x):
    """Keys or values that differ between NSA's branches."""
    return tuple(np.roll(x, shift, -1) for shift in range(3))


WHERE = pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
FORMS = pytest.mark.parametrize("form", ["gather", "xla"])


@WHERE
def test_moba_is_its_definition(packed):
    x, ids = inputs(1 if packed else 4), segments() if packed else None
    assert difference(moba(x["q"], x["k"], x["v"], ids), naive_moba(x["q"], x["k"], x["v"], ids)) < 2e-5


@WHERE
def test_nsa_is_its_definition(packed):
    x, ids = inputs(), segments() if packed else None
    k, v = branches(x["k"]), branches(x["v"])
    assert difference(nsa(x["q"], k, v, x["gates"], ids), naive_nsa(x["q"], k, v, x["gates"], ids)) < 2e-5


@WHERE
@FORMS
def test_indexed_attention_is_its_definition(packed, form):
    x, ids = inputs(), segments() if packed else None
    out, loss = indexed(x["q"], x["k"], x["v"], x["index"], ids, implementation=form)
    expected, expected_loss = naive_indexed(x["q"], x["k"], x["v"], *x["index"], ids)
    assert difference(out, expected) < 2e-5
    assert difference(loss, expected_loss) < 2e-5


# Gradients, with the choice fixed as the papers have it.


def assert_gradients(f, naive, *arguments):
    """Of f's sum for each argument, along a random direction, against central differences of the float64 form."""
    grads = jax.jit(jax.grad(f, tuple(range(len(arguments)))))(*arguments)
    for i, (x, grad) in enumerate(zip(arguments, grads, strict=True)):
        assert np.isfinite(np.asarray(grad)).all()
        direction = np.random.default_rng(i).normal(size=x.shape)

        def moved(step, i=i, x=x, direction=direction):
            return naive(*arguments[:i], np.float64(x) + step * direction, *arguments[i + 1 :])

        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        norm = np.sqrt(np.square(np.float64(grad)).sum())
        assert norm > 0.1
        assert abs((np.float64(grad) * direction).sum() - expected) < 5e-5 * norm, f"argument {i}"


@WHERE
def test_gradients_of_moba(packed):
    x, ids = inputs(), segments() if packed else None
    q, k, v, d = (x[name] for name in ("q", "k", "v", "direction"))
    assert_gradients(
        lambda q, k, v: (moba(q, k, v, ids) * d).sum(),
        lambda *a: (naive_moba(*a, ids, choices=(q, k)) * d).sum(),
        q, k, v,
    )  # fmt: skip


def test_gradients_of_nsa():
    x, ids = inputs(), segments()
    q, k, v, gates, d = (x[name] for name in ("q", "k", "v", "gates", "direction"))
    assert_gradients(
        lambda q, k, v, gates: (nsa(q, branches_of(k), branches_of(v), gates, ids) * d).sum(),
        lambda q, k, v, gates: (naive_nsa(q, k, v, gates, ids, choices=(x["q"], x["k"])) * d).sum(),
        q, np.stack(branches(k)), np.stack(branches(v)), gates,
    )  # fmt: skip


def branches_of(x):
    return tuple(x[i] for i in range(3))


@FORMS
def test_gradients_of_indexed_attention(form):
    """The output's go to q, k and v alone, the loss's to the indexer alone."""
    x, ids = inputs(), segments()
    q, k, v, index, d = (x[name] for name in ("q", "k", "v", "index", "direction"))
    d_loss = d[..., 0, 0]

    def both(q, k, v, *index):
        out, loss = indexed(q, k, v, index, ids, implementation=form)
        return (out * d).sum() + (loss * d_loss).sum()

    def naive(q64, k64, v64, *index64):
        out, loss = naive_indexed(q64, k64, v64, *index64, ids, choices=index, target=(q, k))
        return (out * d).sum() + (loss * d_loss).sum()

    assert_gradients(both, naive, q, k, v, *index)


# What follows from the definitions.


def test_choosing_everything_is_full_attention():
    x, ids = inputs(), segments()
    full = np.asarray(softmax_attention(x["q"], x["k"], x["v"], segment_ids=ids))
    assert difference(moba(x["q"], x["k"], x["v"], ids, top=12), full) < 2e-6
    assert difference(indexed(x["q"], x["k"], x["v"], x["index"], ids, top=T)[0], full) < 2e-6
    selected = np.broadcast_to([0.0, 1.0, 0.0], (B, T, H, 3))
    assert difference(nsa(x["q"], x["k"], x["v"], selected, ids, top=12), full) < 2e-6
    assert difference(moba(x["q"], x["k"], x["v"], ids), full) > 1e-2


def test_one_block_is_the_own_one():
    x = inputs()
    chunked = softmax_attention(x["q"], x["k"], x["v"], segment_ids=jnp.broadcast_to(jnp.arange(T) // BLOCK, (B, T)))
    assert difference(moba(x["q"], x["k"], x["v"], top=1), np.asarray(chunked)) < 2e-6


def test_ties_go_to_the_earlier():
    """Many index scores are exactly 0, and decoding must break ties as the forward pass does."""
    x = inputs()
    k = np.broadcast_to(x["k"][:, :1], x["k"].shape)
    early = np.where(np.arange(T) < 2 * BLOCK, np.arange(T), 1000)  # values tell which keys were seen
    out = moba(x["q"], k, np.broadcast_to(early[None, :, None, None], (B, T, 2, V)).astype(np.float32), top=3)
    assert (np.asarray(out)[:, 2 * BLOCK - 1] < 2 * BLOCK).all()
    at = 4 * BLOCK  # sees blocks 0, 1 and itself
    np.testing.assert_allclose(out[:, at], (np.arange(2 * BLOCK).sum() + 1000) / (2 * BLOCK + 1), rtol=1e-5)
    index_q, index_k, index_w = x["index"]
    tokens = choose_tokens(-np.abs(index_q), np.abs(index_k), np.sign(index_w), top_k=5)
    assert (np.asarray(tokens)[:, 5:] == np.arange(5)).all()
    assert (np.asarray(tokens)[:, 2] == [0, 1, 2, -1, -1]).all()


def test_a_cache_gives_what_the_whole_pass_gives():
    """Queries at any positions over slots, of which the later ones hold what is not there yet."""
    x, length = inputs(), 60
    q, k, v, index = (x[name] for name in ("q", "k", "v", "index"))
    pad = lambda a: jnp.pad(a, [(0, 0), (0, length - T)] + [(0, 0)] * (a.ndim - 2), constant_values=9.0)  # noqa: E731
    slots, index_k = (pad(k), pad(v)), pad(index[1])

    @jax.jit
    def both(q, index_q, index_w, positions):
        blocks = moba_attention(q, *slots, block_size=BLOCK, top_k=TOP, query_positions=positions)
        forms = [
            indexed_attention(q, *slots, index_q, index_k, index_w, top_k=10, query_positions=positions,
                              implementation=form)[0] for form in ("gather", "xla")
        ]  # fmt: skip
        return blocks, *forms

    expected = moba(q, k, v), *(indexed(q, k, v, index)[0],) * 2
    for begin, end, padding in [(0, 13, 3), (13, 14, 0), (14, 45, 0), (30, 31, 0)]:
        # The two rows of the batch stand at different positions.
        rows = np.stack([np.arange(begin, end), np.maximum(np.arange(begin, end) - 9, 0)])
        rows[1] = rows[1, 0] + np.arange(end - begin)
        ask = [np.take_along_axis(a, rows.reshape(B, -1, *(1,) * (a.ndim - 2)), 1) for a in (q, index[0], index[2])]
        ask = [np.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2)) for a in ask]
        got = both(*ask, np.pad(rows, ((0, 0), (0, padding)), constant_values=-1))
        for a, b in zip(got, expected, strict=True):
            assert np.isfinite(a).all()
            theirs = np.take_along_axis(np.asarray(b), rows[..., None, None], 1)
            np.testing.assert_allclose(a[:, : end - begin], theirs, atol=5e-6)


def test_pieces_of_queries_change_nothing(monkeypatch):
    x, ids = inputs(), segments()
    q, k, v, gates, index, d = (x[name] for name in ("q", "k", "v", "gates", "index", "direction"))

    def all_three(q, k, v):
        out, loss = indexed_attention(q, k, v, *index, top_k=10, segment_ids=ids)
        sparse = nsa_attention(q, k, v, gates, block_size=BLOCK, top_k=TOP, window=11, segment_ids=ids)
        blocks = moba_attention(q, k, v, block_size=BLOCK, top_k=TOP, segment_ids=ids)
        return ((out + sparse + blocks) * d).sum(), (out, loss, sparse, blocks)

    def run():
        grads, outs = jax.jit(jax.grad(lambda *a: all_three(*a), (0, 1, 2), has_aux=True))(q, k, v)
        return jax.tree.leaves((outs, grads))

    whole = run()
    monkeypatch.setattr(selection, "QUERIES", 16)
    for a, b in zip(run(), whole, strict=True):
        assert difference(a, np.asarray(b)) < 2e-6


def test_learned_compression():
    """A map of whole blocks in place of the mean, here one that weighs a block's keys by their place in it."""
    x = inputs()
    weights = np.linspace(-1, 1, BLOCK).astype(np.float32)

    @jax.jit
    def learned(q, k, v, gates):
        compress = (lambda blocks: jnp.einsum("BNJGK,J->BNGK", blocks, weights),) * 2
        return nsa_attention(q, k, v, gates, block_size=BLOCK, top_k=TOP, window=11, compress=compress)

    naive = (lambda block: weights @ block,) * 2
    k, v = (x["k"],) * 3, (x["v"],) * 3
    assert difference(learned(x["q"], k, v, x["gates"]), naive_nsa(x["q"], k, v, x["gates"], compress=naive)) < 2e-5


def test_half_precision_accumulates_in_float32():
    x = inputs()
    half = [jnp.asarray(x[name], jnp.bfloat16) for name in ("q", "k", "v")]
    exact = naive_moba(*[np.asarray(a, np.float32) for a in half])
    out = moba(*half)
    assert out.dtype == jnp.bfloat16
    assert difference(np.asarray(out, np.float32), exact) < 0.02


def test_a_layers_own_loss_joins_the_backward_pass_only():
    def objective(x, w, attach):
        y = 3 * x
        return (attach_loss(y, (w**2).sum()) if attach else y).sum()

    x, w = jnp.arange(3.0), jnp.arange(4.0)
    assert objective(x, w, True) == objective(x, w, False)
    d_x, d_w = jax.grad(objective, (0, 1))(x, w, True)
    np.testing.assert_array_equal(d_x, 3)
    np.testing.assert_array_equal(d_w, 2 * w)


def largest(jaxpr):
    """Elements of the largest array in all levels of a jaxpr."""
    sizes = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars]
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            sizes += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(sizes, default=0)


def test_cost_grows_with_the_chosen_keys():
    def flops_and_size(length, top):
        shapes = [jax.ShapeDtypeStruct((1, length, 2, 16), "float32")] * 3
        grads = jax.grad(lambda *x: moba_attention(*x, block_size=16, top_k=top).sum(), (0, 1, 2))
        return jax.jit(grads).lower(*shapes).cost_analysis()["flops"], largest(jax.make_jaxpr(grads)(*shapes).jaxpr)

    (flops, size), (longer_flops, longer_size) = (flops_and_size(length, 3) for length in (512, 2048))
    assert longer_flops < 4.4 * flops
    assert longer_size <= 4.1 * size
    # A tile for every block may be partly empty: 2 + 1 blocks a query cost at most 2 + 1 + 1.
    more_flops, _ = flops_and_size(2048, 5)
    assert 1.2 * longer_flops < more_flops < 1.8 * longer_flops


def test_what_is_saved_for_the_backward_pass_is_no_larger_than_inputs_and_outputs():
    x = inputs()
    _, vjp = jax.vjp(lambda q, k, v: moba(q, k, v), x["q"], x["k"], x["v"])
    saved = sum(leaf.size for leaf in jax.tree.leaves(vjp))
    given = sum(x[name].size for name in ("q", "k", "v"))
    choice, positions, normalisers = B * T * H * (TOP - 1), 4 * B * T, B * T * H
    assert saved <= given + B * T * H * V + choice + positions + normalisers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: moba_attention(q, k[:, :, :1].repeat(3, 2), v, block_size=4, top_k=2), "shapes do not agree"),
        (lambda q, k, v: moba_attention(q, k, v, block_size=0, top_k=2), "block_size"),
        (lambda q, k, v: moba_attention(q, k, v, block_size=4, top_k=0), "top_k"),
        (lambda q, k, v: moba_attention(q[:, 3:], k, v, block_size=4, top_k=2), "query_positions"),
        (lambda q, k, v: moba_attention(q, k, v, block_size=4, top_k=2, segment_ids=segments(9)), "segment_ids"),
        (lambda q, k, v: nsa_attention(q, k, v, q[..., :3], block_size=4, top_k=2, window=3), "at least 3"),
        (lambda q, k, v: nsa_attention(q, k, v, q, block_size=4, top_k=3, window=3), "gates"),
        (lambda q, k, v: indexed_attention(q, k, v, *inputs()["index"], top_k=0), "top_k"),
        (lambda q, k, v: indexed_attention(q, k, v, *inputs()["index"], top_k=2, implementation="cudnn"), "cudnn"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(call, message):
    x = inputs()
    with pytest.raises(ValueError, match=message):
        call(x["q"], x["k"], x["v"])


def test_the_largest_are_the_same_on_one_device_and_on_several():
    x = jax.random.randint(jax.random.key(0), (3, 5, 40), 0, 6).astype(jnp.float32)  # with many ties
    x = x.at[0].set(-jnp.inf)
    for n in (1, 7, 40):
        jax.tree.map(
            np.testing.assert_array_equal, tuple(selection.largest(x, n, devices=1)), selection.largest(x, n, devices=2)
        )
