"""Mixers that select by content: caches, counts, and how the indexer learns. test_invariants.py has the rest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention import state_bytes
from slm.attention.indexer import choose_tokens
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.counts import abstract_parameters
from slm.models.mixers import MIXERS, configured, selection
from slm.models.transformer import Transformer

BASE = ModelConfig(vocab_size=30, layers=1, width=16, heads=4, kv_heads=2, head_dim=8, init_std=0.3)
SMALL = {
    "moba": MixerConfig(block_size=4, top_k=3),
    "nsa": MixerConfig(block_size=4, top_k=4, window=6),
    "nsa_shared": MixerConfig(block_size=4, top_k=4, window=6),
    "dsa": MixerConfig(top_k=8, index_heads=3, index_dim=6),
}
T = 24


def config(name, **changes):
    mixer = dataclasses.replace(SMALL[name], **changes)
    return dataclasses.replace(BASE, attention=(name,), mixer=mixer)


def mixer_of(name, **changes):
    """(mixer class, config as it sees it)."""
    return MIXERS[name].mixer, configured(MIXERS[name], config(name, **changes))


def tokens(length=T):
    return jax.random.randint(jax.random.key(1), (2, length), 0, BASE.vocab_size)


@functools.cache
def parameters(name):
    return jax.jit(Transformer(config(name)).init)(jax.random.key(0))


@pytest.mark.parametrize("name", ["moba", "nsa", "nsa_shared"])
def test_texts_shorter_than_a_block_decode(name):
    """No block ever becomes whole, in the cache as in the forward pass."""
    model = Transformer(config(name, block_size=16))
    params = jax.jit(model.init)(jax.random.key(0))
    cache, x, at = model.init_cache(2, 9), tokens(9), jnp.broadcast_to(jnp.arange(9), (2, 9))
    step = jax.jit(lambda x, at, cache: model.hidden(params, x, positions=at, cache=cache))
    outs = []
    for t in range(0, 9, 3):
        hidden, cache = step(x[:, t : t + 3], at[:, t : t + 3], cache)
        outs.append(hidden)
    expected = jax.jit(lambda x: model.hidden(params, x)[0])(x)
    np.testing.assert_allclose(np.concatenate(outs, 1), expected, atol=5e-6)


@pytest.mark.parametrize("name", ["moba", "nsa", "nsa_shared"])
def test_a_row_that_only_gets_padding_keeps_its_cache(name):
    model, params, x = Transformer(config(name)), parameters(name), tokens(16)
    at = jnp.broadcast_to(jnp.arange(16), (2, 16))
    step = jax.jit(lambda x, at, cache: model.hidden(params, x, positions=at, cache=cache))
    _, cache = step(x[:, :8], at[:, :8], model.init_cache(2, 16))
    _, after = step(x[:, 8:], at[:, 8:].at[1].set(-1), cache)
    row = lambda leaf: leaf[:, 1]  # layers are stacked before rows  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(row, after), jax.tree.map(row, cache))


@pytest.mark.parametrize("name", SMALL)
def test_state_is_counted_to_the_byte(name):
    """Keys and values of 2 heads of 8 in two bytes each, and a position in four, for each slot."""
    mixer, cfg = mixer_of(name)
    slot, pair = 2 * 2 * 8 * 2 + 4, 2 * 2 * 8 * 2
    expected = {
        "moba": T * slot + T // 4 * 2 * 8 * 4,
        "nsa": T * slot + T // 4 * pair + (4 + 6) * slot,
        "nsa_shared": T * slot + T // 4 * pair,
        "dsa": T * (slot + 6 * 2),
    }[name]
    assert state_bytes(jax.eval_shape(lambda: mixer.init_cache(cfg, 3, T, jnp.bfloat16))) == 3 * expected


@pytest.mark.parametrize("name", SMALL)
def test_flops_are_those_of_the_pairs_that_are_seen(name):
    mixer, cfg = mixer_of(name)
    seen = others = 0
    for t in range(T):
        own = t // 4
        chosen = 4 * min(own, cfg.mixer.top_k - 1) + t % 4 + 1
        seen += min(t + 1, 8) if name == "dsa" else chosen
        if name == "moba":
            others += own * 2 * 4 * 8
        elif name == "dsa":
            others += (t + 1) * 2 * 3 * (6 + 1)
        else:
            seen += (t + 1) // 4 + min(t + 1, 6)
    if name == "nsa":
        kernels = [
            leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_parameters(config(name)))
            if "compress" in jax.tree_util.keystr(path) and path[-1].key == "kernel"
        ]
        others += sum(kernels) * 2 * (T // 4 * 2 - T)  # for 2 heads of each block, not once for each token
    np.testing.assert_allclose(mixer.flops_per_token(cfg, T) * T, seen * 4 * 4 * 8 + others, rtol=1e-6)


def losses_and_gradients(params, name="dsa"):
    model, x = Transformer(config(name)), tokens()

    def loss(params):
        hidden, _ = model.hidden(params, x)
        return (model.logits(params, hidden) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


def indexer(params):
    return {name: leaf for name, leaf in params["blocks"]["0"]["mixer"].items() if name.startswith("index_")}


def test_the_indexer_gets_a_gradient_of_its_own_and_gives_none(monkeypatch):
    params = parameters("dsa")
    loss, grads = losses_and_gradients(params)
    monkeypatch.setattr(selection, "attach_loss", lambda x, loss: x)
    same_loss, without = losses_and_gradients(params)
    assert loss == same_loss
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(indexer(without)))
    moved = indexer(grads)
    assert set(moved) == {"index_query", "index_key", "index_key_norm", "index_weight"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        assert np.abs(np.asarray(leaf)).max() > 1e-6, path
    rest = [g["blocks"]["0"]["mixer"] | indexer(without) for g in (grads, without)]
    for a, b in zip(
        jax.tree.leaves((rest[0], grads["embed"])), jax.tree.leaves((rest[1], without["embed"])), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_the_indexer_learns_to_choose_what_attention_looks_at(monkeypatch):
    """Descent along the attached gradient: the divergence falls, and the chosen tokens hold more of full attention."""
    seen = []
    inner = selection.indexed_attention

    def watched(*arguments, **options):
        out, loss = inner(*arguments, **options)
        q, k, _, *index = arguments
        chosen = choose_tokens(*index, top_k=options["top_k"])
        seen.append((loss.mean(), held(q, k, chosen)))
        return out, loss

    def held(q, k, chosen):
        """Share of full attention that falls on the chosen tokens, mean over late queries."""
        logits = jnp.einsum("BTGRK,BSGK->BGRTS", q.reshape(*q.shape[:2], 2, 2, -1), k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool), logits, -jnp.inf), -1).mean((1, 2))
        picked = jnp.take_along_axis(weights, jnp.maximum(chosen, 0), -1)
        return jnp.where(chosen >= 0, picked, 0).sum(-1)[:, T // 2 :].mean()

    monkeypatch.setattr(selection, "indexed_attention", watched)
    model, params, x = (
        Transformer(dataclasses.replace(config("dsa"), scan=False, remat="none")),
        parameters("dsa"),
        tokens(),
    )
    # Sharper attention than that of random weights, so that there is something to find.
    mixer = params["blocks"]["0"]["mixer"]
    mixer = mixer | {"query": jax.tree.map(lambda w: 3 * w, mixer["query"])}

    @jax.jit
    def step(index):
        def loss(index):
            seen.clear()
            tree = params | {"blocks": {"0": params["blocks"]["0"] | {"mixer": mixer | index}}}
            return (model.hidden(tree, x)[0] ** 2).mean(), seen[0]

        grads, watched = jax.grad(loss, has_aux=True)(index)
        return jax.tree.map(lambda w, g: w - 0.015 * jnp.sign(g), index, grads), watched

    index, history = indexer(params), []
    for _ in range(60):
        index, watched = step(index)
        history.append([float(value) for value in watched])
    (first_loss, first_share), (last_loss, last_share) = history[0], history[-1]
    assert last_loss < 0.6 * first_loss
    assert last_share > first_share + 0.1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("moba", {"implementation": "blocked"}, "only xla"),
        ("dsa", {"implementation": "cudnn"}, "only xla"),
        ("nsa", {"top_k": 2}, "at least 3"),
    ],
)
def test_what_cannot_be_served_is_refused(name, changes, message):
    model = Transformer(config(name, **changes))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: model.hidden(parameters(name), tokens()))


def test_the_choice_of_form_is_reported():
    mixer, cfg = mixer_of("dsa")
    assert mixer.backend(cfg, 8 * cfg.mixer.top_k, jnp.float32, "cpu", False) == "xla"
    assert mixer.backend(cfg, 1024, jnp.float32, "cpu", False) == "gather"
