"""A teacher with another tokenizer: sorted probabilities, and where the two have read the same text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_teacher import BASE, TEACHER, B, T, V, experiment, make_batch, sharp, teacher_params

from slm.compress.distill import distill_objective
from slm.compress.divergences import tvd, uld
from slm.compress.translate import Translator, spread_of
from slm.config import check, override
from slm.data.token_bytes import byte_alphabet
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError
from slm.models.transformer import Transformer

TEXTS = ["Zwölf Boxkämpfer jagen 12 Füchse. \U0001f98a quer über den Deich! " * 3, "the thin thing thinks then. " * 9]


def test_ids_mean_nothing_to_it():
    rng = np.random.default_rng(0)
    z, w = rng.normal(0, 2, (3, 5, 11)), rng.normal(0, 2, (3, 5, 17))
    log_p = jax.nn.log_softmax(w)
    p, q = np.sort(np.exp(log_p), -1)[..., ::-1], np.sort(np.asarray(jax.nn.softmax(z)), -1)[..., ::-1]
    want = np.abs(p - np.pad(q, ((0, 0), (0, 0), (0, 6)))).sum(-1)
    np.testing.assert_allclose(uld(z, log_p), want, rtol=1e-5)
    np.testing.assert_allclose(uld(w[..., rng.permutation(17)], log_p), 0, atol=1e-6)
    assert (uld(w, log_p) == 0).all()
    other = rng.normal(size=(3, 5, 17))
    assert (uld(other, log_p) <= 2 * tvd(other, log_p) + 1e-6).all()
    grads = jax.grad(lambda z: uld(z, log_p).sum())(jnp.asarray(z))
    assert np.isfinite(grads).all()
    assert np.abs(grads).max() > 1e-3


def tokenizers():
    return build_tokenizer("bytes", lambda: iter(TEXTS)), build_tokenizer("bpe:300", lambda: iter(TEXTS))


def windows(tokenizer, length):
    """Rows of documents, each behind the token that ends texts, the last row padded."""
    ids = np.concatenate([[tokenizer.end_of_text, *tokenizer.encode(text)] for text in TEXTS])
    rows = -(-len(ids) // length)
    tokens = np.zeros(rows * length, np.int32)
    tokens[: len(ids)] = ids
    segments = np.cumsum(tokens == tokenizer.end_of_text) + 1
    segments[len(ids) :] = 0
    return {"tokens": tokens.reshape(rows, length), "segment_ids": segments.reshape(rows, length).astype(np.int32)}


def spelled(tokenizer, ids):
    """Bytes that ids stand for; byte-level tokens need not be whole characters."""
    alphabet = {c: b for b, c in enumerate(byte_alphabet())}
    names = [tokenizer.backend.id_to_token(int(i)) for i in ids]
    return b"".join(bytes(alphabet[c] for c in name) for name in names if name != tokenizer.end_of_text_token)


@pytest.mark.parametrize("swap", [False, True], ids=["from bytes", "to bytes"])
def test_aligned_tokens_have_read_the_same(swap):
    student, teacher = tokenizers()[:: -1 if swap else 1]
    batch, prefix = windows(student, 37), [teacher.end_of_text]
    spread = spread_of(student, teacher, prefix, batch)
    assert spread == (5 if swap else 1)
    entries = Translator(student, teacher, prefix, spread).entries(batch)
    rows = {name: entries[name].reshape(len(batch["tokens"]), -1) for name in ("teacher_tokens", "teacher_segment_ids")}
    aligned = 0
    for row, (tokens, segments) in enumerate(zip(batch["tokens"], batch["segment_ids"])):
        theirs, their_segments = rows["teacher_tokens"][row], rows["teacher_segment_ids"][row]
        for t, at in enumerate(entries["teacher_at"][row]):
            if at >= 0:
                aligned += 1
                assert segments[t] == their_segments[at] > 0
                mine = spelled(student, tokens[: t + 1][segments[: t + 1] == segments[t]])
                read = spelled(teacher, theirs[: at + 1][their_segments[: at + 1] == segments[t]])
                # A character that the edge of the row cuts in two is not told to the teacher.
                assert mine.endswith(read)
                assert len(mine) - len(read) < 4
    there = (batch["segment_ids"] > 0).sum()
    assert aligned > (0.9 if swap else 0.3) * there, (aligned, there)


def test_with_the_same_tokenizer_all_is_as_it_was():
    student, _ = tokenizers()
    batch = windows(student, 37)
    entries = Translator(student, student, [student.end_of_text], 1).entries(batch)
    whole = ~np.isin(np.arange(len(batch["tokens"])), [r for r, at in enumerate(entries["teacher_at"]) if at[0] != 0])
    assert whole.sum() >= 5
    seen = batch["segment_ids"][whole] > 0
    np.testing.assert_array_equal(entries["teacher_tokens"][whole, :, 0], batch["tokens"][whole] * seen)
    at = entries["teacher_at"][whole]
    assert (at[seen] == np.broadcast_to(np.arange(37), at.shape)[seen]).mean() > 0.95
    # What does not fit is cut off.
    short = (
        Translator(student, student, [], 1)
        ._replace(teacher=student)
        .entries({name: np.concatenate([x, x], 1) for name, x in batch.items()})
    )
    assert short["teacher_at"].max() < 2 * 37


def test_a_student_is_pulled_to_the_shape_of_what_a_teacher_says():
    cfg = experiment(distill__loss="uld", distill__alpha=1.0)
    student = Transformer(dataclasses.replace(BASE.model, vocab_size=19))
    objective = distill_objective(cfg, student, TEACHER)
    batch, rng = make_batch(), np.random.default_rng(1)
    at = rng.integers(-1, 2 * T, (B, T), dtype=np.int32)
    more = {
        "teacher_tokens": rng.integers(0, V, (B, T, 2), dtype=np.int32), "teacher_at": at,
        "teacher_segment_ids": np.ones((B, T, 2), np.int32),
    }  # fmt: skip
    batch = batch | more | {"tokens": batch["tokens"] % 19, "targets": batch["targets"] % 19}
    params = sharp(student.init(jax.random.key(1)), 3.0)
    value = jax.jit(jax.value_and_grad(lambda p, t: objective.apply(p, {}, batch, t, 0), (0, 1), has_aux=True))
    (loss, sums), (grads, theirs) = value(params, teacher_params())
    assert not any(leaf.any() for leaf in jax.tree.leaves(theirs))
    assert sums["aligned"] == pytest.approx(((at >= 0) * batch["weights"]).sum())
    # The same, from all logits at once.
    tokens, segments = (more[name].reshape(B, -1) for name in ("teacher_tokens", "teacher_segment_ids"))
    said = TEACHER.logits(teacher_params(), TEACHER.hidden(teacher_params(), tokens, segment_ids=segments)[0])
    said = np.take_along_axis(np.asarray(said), np.maximum(at, 0)[..., None], 1)
    where = {"segment_ids": batch["segment_ids"], "positions": batch["positions"]}
    mine = student.logits(params, student.hidden(params, batch["tokens"], **where)[0])
    want = (uld(mine, jax.nn.log_softmax(said)) * (at >= 0) * batch["weights"]).sum()
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    step = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
    assert value(step, teacher_params())[0][0] < loss


@pytest.mark.parametrize(("changes", "message"), [
    ({"distill.hidden": 0.1}, r"uld with distill\.hidden: the teacher reads other tokens"),
    ({"distill.on_policy": 0.1, "distill.prompt_tokens": 2}, r"uld with distill\.on_policy"),
    ({"distill.teacher": None, "distill.cached": "there"}, r"uld with distill\.cached"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(override(experiment(distill__loss="uld"), changes))
