"""The approximation study measures what it says: on itself, at full budget, and where theory tells the answer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slm
from slm.attention import softmax_attention
from slm.attention.patterns import causal, global_tokens, window
from slm.models.transformer import Transformer
from slm.study.approximation import FAMILIES, Approximation, approximations, compare, plot
from slm.study.scores import POSITIONAL, capture_qk, controlled_qk, describe, entropy, exact_rows

T, K = 32, 16


@functools.cache
def tried(family):
    """The approximations of a family, compiled once for all tests."""
    return approximations(T, K, [family])


@functools.cache
def drawn(std, batch=2):
    return controlled_qk(jax.random.key(0), T, K, std, batch=batch, heads=2)


def table(family, std, batch=2, **options):
    return compare(*drawn(std, batch), tried(family), **options)


def scores(q, k):
    return exact_rows(q, k)[1]


@pytest.mark.parametrize("std", [0.25, 4.0])
def test_scores_have_the_spread_asked_for(std):
    q, k, v = drawn(std)
    assert q.shape == k.shape == v.shape == (2, T, 2, K)
    measured = np.std(scores(q, k), axis=(-2, -1), where=np.tri(T, dtype=bool))
    np.testing.assert_allclose(measured, std, rtol=1e-4)
    described = describe(q, k)
    assert described["score_std"] == pytest.approx(std, rel=0.2)
    assert 0 < described["entropy"] < math.log(T)


def test_a_needle_raises_the_score_of_one_earlier_key():
    plain, needled = (controlled_qk(jax.random.key(1), T, K, 1.0, needle=needle) for needle in (0, 5.0))
    raised = (scores(*needled[:2]) - scores(*plain[:2]))[0, 0]
    for i in range(1, T):
        assert np.isclose(raised[i], 5, atol=1e-4)[:i].sum() == 1
        assert np.median(np.abs(raised[i])) < 2.5


def test_locality_adds_what_falls_with_distance():
    q, k, _ = controlled_qk(jax.random.key(2), T, K, 1e-4, locality=3.0)
    added = scores(q, k)[0, 0]
    wanted = [3 * np.mean(np.cos(T ** -np.linspace(0, 1, POSITIONAL // 2) * d)) for d in range(T)]
    np.testing.assert_allclose(added[:, 0], wanted, atol=2e-3)
    np.testing.assert_allclose(added[5:, 5], wanted[: T - 5], atol=2e-3)
    assert max(wanted[1:]) < wanted[0]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"std = 0: must be above 0"):
        controlled_qk(jax.random.key(0), T, K, 0)
    with pytest.raises(ValueError, match=f"K = {POSITIONAL}: locality takes"):
        controlled_qk(jax.random.key(0), T, POSITIONAL, 1, locality=1)


@pytest.mark.parametrize("causal", [True, False])
def test_exact_attention_has_no_error(causal):
    attend = jax.jit(lambda key, q, k, v: softmax_attention(q, k, v, causal=causal))
    (row,) = compare(*drawn(1.0), [Approximation("exact", T, 0, 0, attend, causal)])
    assert row["output_error"] < 1e-6
    assert abs(row["kl"]) < 1e-6
    assert abs(row["reverse_kl"]) < 1e-6
    assert row["top1"] == row["proper"] == row["covering"] == 1
    start = T // 2 if causal else 0
    wanted = entropy(exact_rows(*drawn(1.0)[:2], causal)[0][:, :, start:]).mean()
    assert row["entropy"] == pytest.approx(wanted, rel=1e-5)


def test_a_window_of_all_is_exact_and_a_narrow_one_keeps_the_weight_in_it():
    rows = table("window", 1.0, first_query=0)
    assert [row["size"] for row in rows] == [1, 2, 4, 8, 16, 32]
    assert rows[-1]["output_error"] < 1e-6
    assert rows[-1]["share"] == rows[-1]["top1"] == 1
    errors = [row["output_error"] for row in rows]
    assert errors == sorted(errors, reverse=True)
    exact = exact_rows(*drawn(1.0)[:2])[0]
    seen = np.tri(T, dtype=bool) & ~np.tri(T, k=-4, dtype=bool)
    assert rows[2]["reverse_kl"] == pytest.approx(-np.log((exact * seen).sum(-1)).mean(), rel=1e-5)
    # Queries that see all of their past are covered, the others not; one key of its own is all that query 0 has.
    assert rows[2]["covering"] == 4 / T
    assert rows[0]["entropy"] == 0
    assert math.isnan(table("window", 1.0)[0]["kl"])


def test_uniform_weights_are_uniform():
    (row,) = table("uniform", 1.0, first_query=0)
    assert row["entropy"] == pytest.approx(np.log(1 + np.arange(T)).mean(), rel=1e-5)
    assert row["covering"] == 1


def test_the_oracle_keeps_the_largest_weights():
    rows = table("top", 2.0, first_query=0)
    exact = np.sort(exact_rows(*drawn(2.0)[:2])[0], -1)[..., ::-1]
    for row in rows:
        assert row["top1"] == 1
        kept = exact[..., : row["size"]].sum(-1)
        assert row["reverse_kl"] == pytest.approx(-np.log(kept).mean(), rel=1e-4)


def test_random_features_need_many_and_the_more_the_larger_the_scores():
    few, *_, many = table("performer", 0.5, batch=4)
    assert (few["size"], many["size"]) == (16, 1024)
    assert many["output_error"] < few["output_error"] / 2
    assert many["kl"] < few["kl"] / 4
    assert many["output_error_stderr"] > 0
    assert table("performer", 2.0, batch=4)[-1]["output_error"] > 2 * many["output_error"]


def test_random_draws_follow_the_seed():
    first, again, other = (table("performer", 0.5, seed=seed)[0]["output_error"] for seed in (0, 0, 1))
    assert first == again != other


def test_taylor_expansion_serves_small_scores_only():
    small, large = (table("taylor2", std)[-1] for std in (0.1, 4.0))
    assert small["size"] == 1 + K + K * (K + 1) // 2
    assert small["output_error"] < 0.01
    assert large["output_error"] > 0.3
    errors = [row["output_error"] for row in table("taylor2", 0.1)]
    assert errors == sorted(errors, reverse=True)


def test_rows_that_are_no_distributions_have_no_divergence():
    row = table("linformer", 1.0)[-1]
    assert row["proper"] < 0.1
    assert math.isnan(row["kl"])
    assert row["output_error"] > 0.5


def test_one_sequence_has_no_standard_error():
    assert math.isnan(compare(*(x[:1] for x in drawn(1.0)), tried("elu1"))[0]["output_error_stderr"])


def test_budgets():
    assert {approximation.family for approximation in approximations(T, K)} == set(FAMILIES)
    for family in FAMILIES:
        reads = [approximation.read for approximation in tried(family)]
        assert reads == sorted(set(reads))
        assert all(isinstance(approximation.size, int) for approximation in tried(family))
    i, j = np.arange(T)[:, None], np.arange(T)
    longformer, sinks = causal & (window(8) | global_tokens(4)), (j <= i) & ((i - j < 8) | (j < 4))
    np.testing.assert_array_equal(longformer(i, j), sinks)  # which is why there is no line of its own
    with pytest.raises(ValueError, match="T = 40: must be a multiple of 32"):
        approximations(40, K)
    with pytest.raises(ValueError, match="no family windows: must be of uniform, elu1"):
        approximations(T, K, ["windows"])


def language_model(*attention, layers=2):
    cfg = slm.ModelConfig(vocab_size=11, layers=layers, width=32, heads=4, kv_heads=2, attention=attention, mlp="none",
                          mixer=slm.MixerConfig(qk_norm="l2"))  # fmt: skip
    params = jax.jit(Transformer(cfg).init)(jax.random.key(0))
    params["blocks"] = jax.tree.map(lambda x: x * 20, params["blocks"])  # so that attention matters
    return slm.LanguageModel(params, slm.Experiment(model=cfg), None)


def test_captured_arrays_are_those_the_model_attends_with():
    model = language_model("softmax")
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 11)
    captured = capture_qk(model, tokens)
    assert set(captured) == {0, 1}
    x = model.params["embed"]["embedding"][tokens]
    for layer, (q, k, v) in captured.items():
        assert q.shape == k.shape == v.shape == (2, 9, 4, 8)
        assert describe(q, k)["score_std"] > 0.3
        out = softmax_attention(q, k, v).reshape(2, 9, -1)
        x += out @ model.params["blocks"]["0"]["mixer"]["out"]["kernel"][layer]
    x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + model.config.model.norm_eps)
    hidden, _ = model.transformer.hidden(model.params, tokens)
    np.testing.assert_allclose(x * model.params["final_norm"]["scale"], hidden, rtol=2e-5, atol=2e-5)


def test_only_plain_softmax_layers_are_captured():
    tokens = jnp.zeros((1, 4), jnp.int32)
    assert set(capture_qk(language_model("window", "softmax", "sink_softmax", layers=3), tokens)) == {1}
    with pytest.raises(ValueError, match="no layer of window is plain softmax"):
        capture_qk(language_model("window"), tokens)


def test_plot(tmp_path):
    rows = table("window", 1.0) + table("linformer", 1.0)
    plot({"one": rows, "other": rows}, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
