"""Masked-LM batches, and training on them."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny

import slm
from slm.data.masking import Masking
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError

MASKING = Masking(fraction=0.15, mask=50, vocabulary=50, end_of_text=7, seed=3)


def batch_of(B, T, seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 50, (B, T + 1)).astype(np.int32)
    weights = (random.random((B, T)) < 0.9).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "bytes": tokens[:, 1:] + 1}


def test_shares_are_those_of_bert_and_only_scored_tokens_are_hidden():
    batch = batch_of(200, 500)
    made = MASKING.train(batch, 5, 0)
    asked = made["weights"] > 0
    may = (batch["weights"] > 0) & (batch["targets"] != 7)
    assert not asked[~may].any()
    assert asked[may].mean() == pytest.approx(0.15, abs=0.005)
    np.testing.assert_array_equal(made["tokens"][~asked], batch["targets"][~asked])
    seen, true = made["tokens"][asked], batch["targets"][asked]
    assert (seen == 50).mean() == pytest.approx(0.8, abs=0.015)
    other = seen[(seen != 50) & (seen != true)]
    # A random token is the true one once in 50.
    assert len(other) / len(seen) == pytest.approx(0.1 * 49 / 50, abs=0.01)
    assert set(other) == set(range(50))
    for name in ("targets", "bytes"):
        np.testing.assert_array_equal(made[name], batch[name])
    # Hiding does not depend on the place in the row, nor on the token.
    assert asked[:, :100].sum() / may[:, :100].sum() == pytest.approx(0.15, abs=0.01)


def test_training_masks_are_a_function_of_seed_step_and_row():
    batch = batch_of(6, 40)
    whole = MASKING.train(batch, 5, 0)
    parts = [MASKING.train({k: v[i : i + 3] for k, v in batch.items()}, 5, i) for i in (0, 3)]
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))
    for other in (
        MASKING.train(batch, 6, 0),
        Masking(0.15, 50, 50, 7, 4).train(batch, 5, 0),
        MASKING.train(batch, 5, 1),
    ):
        assert (other["weights"] != whole["weights"]).any()
    same = {name: np.repeat(array[:1], 6, 0) for name, array in batch.items()}
    assert len(np.unique(MASKING.train(same, 5, 0)["weights"], axis=0)) == 6


def test_validation_masks_are_a_function_of_the_row_alone():
    batch = batch_of(6, 40)
    whole, turned = MASKING.validation(batch), MASKING.validation({k: v[::-1] for k, v in batch.items()})
    for name in whole:
        np.testing.assert_array_equal(whole[name], turned[name][::-1])
    assert len(np.unique(whole["weights"], axis=0)) == 6


def test_a_tokenizer_without_a_mask_token_gets_one_behind_its_last():
    tokenizer = build_tokenizer("bytes", lambda: iter(()))
    n = tokenizer.vocab_size
    assert Masking.create(0.15, tokenizer, n + 1, 0).mask == n
    with pytest.raises(ConfigError, match=f"model.vocab_size = {n}: this tokenizer has no .MASK.*: set {n + 1}, or 0"):
        Masking.create(0.15, tokenizer, n, 0)


ENCODER = {
    "model.causal": False, "model.head": "masked_lm", "model.head_activation": "gelu_erf", "model.head_norm": True,
    "model.embedding_norm": True, "model.first_norm": False, "model.token_types": 2, "data.mask_fraction": 0.3,
    "model.bias": ("head", "head_dense"), "train.steps": 600, "train.evaluate_every": 0, "checkpoint.every": 0,
    "train.batch_size": 16, "optim.learning_rate": 5e-3, "optim.warmup_steps": 10,
}  # fmt: skip


def test_an_encoder_learns_hidden_tokens_from_both_sides(tmp_path):
    letters = np.random.default_rng(0).choice(list("abcdefg"), 6000)
    (tmp_path / "text.txt").write_text("".join(letter * 2 for letter in letters))
    run = slm.train(tiny(tmp_path, ENCODER))
    assert run.model.config.model.vocab_size == run.model.tokenizer.vocab_size + 1
    last = [row["validation_loss"] for row in run.history if "validation_loss" in row][-1]
    # Every letter stands twice; without looking, ln 7 = 1.95 nats are left.
    assert last < 1.2, last
    # Of a row's first token only what stands to its right can tell.
    tokens, mask = np.stack([run.model.tokenizer.encode(row) for row in ("ggaaccbb", "ccffaadd", "bbeeggaa")]), 257
    assert mask == run.model.tokenizer.vocab_size
    seen = tokens.copy()
    seen[:, 0] = mask
    scores = slm.logits(run.model, seen)
    assert scores.shape == (3, 8, mask + 1)
    np.testing.assert_array_equal(jnp.argmax(scores[:, 0], -1), tokens[:, 0])


def test_only_heads_over_tokens_are_trained(tmp_path):
    changes = {"model.causal": False, "model.head": "sequence", "model.labels": 2}
    with pytest.raises(ConfigError, match=r"model.head = sequence: sources have no labels"):
        slm.train(tiny(tmp_path, changes))
