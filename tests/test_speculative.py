"""Speculative decoding writes what the large model alone would write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.config import Experiment, MixerConfig, ModelConfig
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError
from slm.evaluation.decoding import Decoding
from slm.evaluation.generate import generate, stream
from slm.evaluation.sampling import make_sampling
from slm.evaluation.speculative import Draft, SpeculativeDecoding
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

V, N = 40, 20
BASE = ModelConfig(vocab_size=V, width=16, layers=2, heads=4, kv_heads=2)
DRAFT = dataclasses.replace(BASE, layers=1, heads=2, vocab_size=48)  # padded to another size
GREEDY, WARM = make_sampling(temperature=0), make_sampling(temperature=1.3, top_k=30, top_p=0.97)


def initialised(cfg, seed=0, std=0.5):
    transformer, rng = Transformer(cfg), np.random.default_rng(seed)
    shapes = jax.eval_shape(transformer.init, jax.random.key(0))
    return transformer, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, std, a.shape), jnp.float32), shapes)


def nearby(transformer, params, noise):
    """A draft that often agrees."""
    rng = np.random.default_rng(7)
    return transformer, jax.tree.map(lambda a: a * jnp.asarray(rng.normal(1, noise, a.shape), jnp.float32), params)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).astype(np.int32) for n in (9, 1, 4)]


def everything(decoding, pieces=(N,)):
    rows, pieces = None, [*pieces]
    while not decoding.finished:
        more = decoding.advance(pieces.pop(0) if pieces else N)
        rows = more if rows is None else [np.concatenate(pair) for pair in zip(rows, more)]
    return rows


@pytest.mark.parametrize(
    ("attention", "draft"),
    [(("softmax", "softmax"), "near"), (("window", "softmax"), "far"), (("gated_delta", "forgetting"), "far")],
)
def test_the_greedy_text_is_that_of_the_large_model(attention, draft, prompts):
    """Caches that can be rewound, rings and states that cannot, on either side."""
    mixer = MixerConfig(window=5 if "window" in attention else None)
    model = initialised(dataclasses.replace(BASE, attention=attention, mixer=mixer))
    far = initialised(dataclasses.replace(DRAFT, attention=attention[:1], mixer=mixer))
    small = nearby(*model, 0.02) if draft == "near" else far
    how = {"max_new_tokens": N, "sampling": GREEDY, "ends": (11, 3)}
    want = everything(Decoding(*model, prompts, **how))
    decoding = SpeculativeDecoding(*model, prompts, Draft(*small, tokens=3), **how)
    got = everything(decoding)
    assert [row.tolist() for row in got] == [row.tolist() for row in want]
    assert decoding.kept_share > 0.5 if draft == "near" else decoding.kept_share < 0.5


@pytest.fixture(scope="module")
def pair():
    model = initialised(BASE)
    return model, nearby(*model, 0.1)


def test_the_distribution_is_that_of_the_large_model():
    """Pairs of tokens after a prompt, against their probabilities, with a draft that is mostly wrong."""
    cfg = dataclasses.replace(BASE, vocab_size=6, layers=1)
    model, small = initialised(cfg, std=0.4), initialised(cfg, seed=3, std=0.4)
    prompt, rows = np.array([1, 4, 2], np.int32), 6000
    transformer, params = model

    def probabilities(tokens):
        hidden, _ = transformer.hidden(params, jnp.asarray(tokens, jnp.int32))
        return np.asarray(jax.nn.softmax(transformer.logits(params, hidden)[:, -1] / 1.3), np.float64)

    first = probabilities(prompt[None])[0]
    second = probabilities(np.array([[*prompt, x] for x in range(6)]))
    third = probabilities(np.array([[*prompt, x, y] for x in range(6) for y in range(6)])).reshape(6, 6, 6)
    exact = first[:, None, None] * second[:, :, None] * third
    how = {"max_new_tokens": 3, "sampling": make_sampling(temperature=1.3)}
    decoding = SpeculativeDecoding(*model, [prompt] * rows, Draft(*small, tokens=2), **how)
    drawn = np.array(everything(decoding))
    assert 0.05 < decoding.kept_share < 0.9
    for axes in ((1, 2), (0, 2), (0, 1)):
        one = drawn[:, ({0, 1, 2} - set(axes)).pop()]
        expected = exact.sum(axes)
        counted = np.bincount(one, minlength=6) / rows
        assert (np.abs(counted - expected) < 4.5 * np.sqrt(expected / rows)).all()
    pairs = np.bincount(drawn[:, 1] * 6 + drawn[:, 2], minlength=36)
    expected = exact.sum(0).reshape(-1) * rows
    chi2 = ((pairs - expected) ** 2 / expected).sum()
    assert chi2 < 70  # of 35 degrees of freedom: 0.0004 of the time


@pytest.mark.parametrize("attention", [("softmax", "softmax"), ("gated_delta", "window")])
def test_a_draft_that_is_the_model_is_always_right(attention, prompts):
    """Unless its cache goes astray."""
    mixer = MixerConfig(window=5 if "window" in attention else None)
    model = initialised(dataclasses.replace(BASE, attention=attention, mixer=mixer))
    decoding = SpeculativeDecoding(*model, prompts, Draft(*model), max_new_tokens=N, sampling=WARM)
    everything(decoding)
    assert decoding.kept_share > 0.99


def test_a_row_depends_neither_on_its_neighbours_nor_on_the_pieces(pair, prompts):
    model, small = pair
    how = {"max_new_tokens": N, "sampling": WARM, "ends": (3,)}
    together = everything(SpeculativeDecoding(*model, prompts, Draft(*small, tokens=3), **how))
    pieces = everything(SpeculativeDecoding(*model, prompts, Draft(*small, tokens=3), **how), (1, 2, 5))
    assert [a.tolist() for a in together] == [b.tolist() for b in pieces]
    assert max(len(row) for row in together) == N
    for r, prompt in enumerate(prompts):
        alone = everything(SpeculativeDecoding(*model, [prompt], Draft(*small, tokens=3), seed=r, **how))
        assert alone[0].tolist() == together[r].tolist()


def test_text(pair):
    cfg = dataclasses.replace(BASE, vocab_size=320)
    transformer, params = initialised(cfg)
    model = LanguageModel(params, Experiment(model=cfg), build_tokenizer("bytes", lambda: iter(())))
    small = dataclasses.replace(model, params=nearby(transformer, params, 0.1)[1])
    how = {"max_new_tokens": 24, "temperature": 0}
    assert generate(model, ["ab", "x"], draft=small, **how) == generate(model, ["ab", "x"], **how)
    assert "".join(stream(model, "ab", draft=small, draft_tokens=2, **how)) == generate(model, "ab", **how)
    other = dataclasses.replace(model, tokenizer=build_tokenizer("chars", lambda: iter(["abc"])))
    with pytest.raises(ConfigError, match="has another vocabulary than"):
        generate(model, "ab", draft=other)
    with pytest.raises(ConfigError, match="draft_tokens = 0"):
        generate(model, "ab", draft=small, draft_tokens=0)
