import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.config import Experiment, MeshConfig, ModelConfig, override
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError, DataError
from slm.evaluation.bits_per_byte import MODEL_INPUTS, eval_step_of, evaluate, evaluate_batches, ratio
from slm.models.language_model import LanguageModel, logits
from slm.models.transformer import Transformer
from slm.training.mesh import make_mesh, place_batch


def fake_step(params, batch):
    """Scores that stand in the batch itself: nats in `tokens`, correct where `targets` is even."""
    return {"nats": params * np.asarray(batch["tokens"], np.float32), "correct": np.asarray(batch["targets"]) % 2 == 0}


def random_batches(count, documents, rows=4, length=16, seed=0, dependence=0.0):
    """Batches whose nats share a part within each document."""
    rng = np.random.default_rng(seed)
    level = rng.normal(0, dependence, documents)
    batches = []
    for i in range(count):
        flat = (np.arange(rows * length) + i * rows * length) * documents // (count * rows * length)
        document = flat.reshape(rows, length)
        weights = (rng.random((rows, length)) < 0.8).astype(np.float32)
        batches.append(
            {
                "tokens": 5 + level[document] + rng.normal(0, 1, (rows, length)),
                "targets": rng.integers(0, 10, (rows, length)),
                "weights": weights,
                "segment_ids": document + 1,
                "positions": np.tile(np.arange(length), (rows, 1)),
                "bytes": rng.integers(1, 6, (rows, length)) * (weights > 0),
                "document": document,
            }
        )
    return batches


def joined(batches, name):
    return np.concatenate([batch[name].ravel() for batch in batches])


def test_scores_equal_sums_written_out():
    batches = random_batches(3, documents=30)
    got = evaluate_batches(fake_step, 0.5, batches, by_position=True)
    scored = joined(batches, "weights") > 0
    nats, bytes_ = 0.5 * joined(batches, "tokens")[scored], joined(batches, "bytes")[scored]
    assert got["loss"] == pytest.approx(nats.mean(), rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / bytes_.sum(), rel=1e-6)
    assert got["accuracy"] == pytest.approx((joined(batches, "targets")[scored] % 2 == 0).mean())
    assert (got["tokens"], got["bytes"], got["documents"]) == (scored.sum(), bytes_.sum(), 30)
    assert (got["stderr_clusters"], got["stderr_clustered_by"]) == (30, "document")
    document = joined(batches, "document")[scored]
    x = np.array([nats[document == d].sum() for d in range(30)]) / math.log(2)
    y = np.array([bytes_[document == d].sum() for d in range(30)])
    residuals = x - got["bits_per_byte"] * y
    assert got["bits_per_byte_stderr"] == pytest.approx(math.sqrt(30 * residuals.var(ddof=1)) / y.sum(), rel=1e-5)
    position = joined(batches, "positions")[scored]
    assert got["loss_by_position"] == pytest.approx([nats[position == t].mean() for t in range(16)], rel=1e-6)
    json.dumps(got)


def test_standard_error_of_a_ratio_equals_the_bootstrap():
    rng = np.random.default_rng(0)
    y = rng.gamma(2, 50, 200)  # documents of very different lengths
    x = y * rng.normal(1.5, 0.3, 200)
    value, stderr = ratio(x, y)
    chosen = rng.integers(0, 200, (4000, 200))
    resampled = x[chosen].sum(1) / y[chosen].sum(1)
    assert value == pytest.approx(x.sum() / y.sum())
    assert stderr == pytest.approx(resampled.std(), rel=0.08)
    assert ratio(x[:1], y[:1])[1] is None


@pytest.mark.parametrize(("dependence", "low", "high"), [(0.0, 0.6, 1.5), (2.0, 2.0, 5.0)])
def test_documents_of_dependent_tokens_widen_the_error(dependence, low, high):
    batches = random_batches(8, documents=40, dependence=dependence)
    got = evaluate_batches(fake_step, 1.0, batches)
    nats = joined(batches, "tokens")[joined(batches, "weights") > 0]
    assert low < got["loss_stderr"] / (nats.std() / math.sqrt(len(nats))) < high


def test_clusters_are_windows_and_then_tokens_where_there_is_too_little_text():
    few = evaluate_batches(fake_step, 1.0, random_batches(3, documents=19))
    assert (few["documents"], few["stderr_clusters"], few["stderr_clustered_by"]) == (19, 12, "window")
    (batch,) = random_batches(1, documents=2)
    batch["weights"][1:] = 0
    one = evaluate_batches(fake_step, 1.0, [batch])
    assert (one["stderr_clusters"], one["stderr_clustered_by"]) == (one["tokens"], "token")
    assert one["bits_per_byte_stderr"] > 0


def test_without_bytes_there_are_no_bits_per_byte():
    batches = [batch | {"bytes": 0 * batch["bytes"]} for batch in random_batches(2, documents=30)]
    got = evaluate_batches(fake_step, 1.0, batches)
    assert "bits_per_byte" not in got
    assert "bits_per_byte_stderr" not in got
    assert got["accuracy_stderr"] == pytest.approx(math.sqrt(0.25 / got["tokens"]), rel=0.5)


def test_positions_never_seen_are_none():
    (batch,) = random_batches(1, documents=2)
    batch["weights"][:, 3] = 0
    losses = evaluate_batches(fake_step, 1.0, [batch], by_position=True)["loss_by_position"]
    assert [t for t, loss in enumerate(losses) if loss is None] == [3]


def test_nothing_scored_is_an_error():
    (batch,) = random_batches(1, documents=2)
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate_batches(fake_step, 1.0, [batch | {"weights": 0 * batch["weights"]}])


def test_batches_spread_over_devices_score_the_same():
    mesh = make_mesh(MeshConfig())
    batches = random_batches(2, documents=30, rows=8)
    seen = []

    def step(params, batch):
        seen.append((set(batch), len(batch["tokens"].sharding.device_set)))
        return fake_step(params, batch)

    got = evaluate_batches(step, 1.0, batches, place=lambda batch: place_batch(batch, mesh))
    assert_same(got, evaluate_batches(fake_step, 1.0, batches))
    assert seen == [(set(MODEL_INPUTS), jax.device_count())] * 2


def assert_same(got, want):
    assert got.pop("stderr_clustered_by") == want.pop("stderr_clustered_by")
    assert got == pytest.approx(want, rel=1e-5)


# A whole model.

TEXT = "Größe: a text of fifty-odd bytes – and a few more.\n" * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    cfg = ModelConfig(vocab_size=257, layers=1, width=16, heads=2, init_std=0.3)
    experiment = override(
        Experiment(model=cfg), {"data.sequence_length": 32, "data.cache": str(tmp_path_factory.mktemp("cache"))}
    )
    tokenizer = build_tokenizer("bytes", lambda: iter(()))
    return LanguageModel(jax.jit(Transformer(cfg).init)(jax.random.key(0)), experiment, tokenizer)


def naive_nats(model, windows, counts):
    """-log p of the first counts[i] targets of each window (32 tokens and one more), from slm.logits."""
    log_p = np.asarray(jax.jit(lambda ids: jax.nn.log_softmax(logits(model, ids)))(windows[:, :-1]))
    return [-log_p[i, t, windows[i, t + 1]] for i, n in enumerate(counts) for t in range(n)]


def test_a_text_is_scored_after_end_of_text_each_token_once(model):
    text = TEXT[:20]
    got = evaluate(model, text)
    windows = np.zeros((1, 33), int)
    windows[0, : 1 + len(text.encode())] = [256, *text.encode()]
    nats = naive_nats(model, windows, [len(text.encode())])
    assert got["tokens"] == got["bytes"] == len(text.encode()) == len(nats) != len(text)
    assert got["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(np.sum(nats) / math.log(2) / len(text.encode()), rel=1e-5)


def test_windows_do_not_overlap_and_batch_size_does_not_matter(model):
    got = evaluate(model, TEXT)
    ids = [256, *TEXT.encode()]
    starts = range(0, len(ids) - 1, 32)
    windows = np.array([(ids + [0] * 33)[start : start + 33] for start in starts])
    nats = naive_nats(model, windows, [min(32, len(ids) - 1 - start) for start in starts])
    assert len(nats) == got["tokens"] == len(TEXT.encode())
    assert got["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert_same(evaluate(model, TEXT, batch_size=2), got)


def test_a_source_is_told_from_a_text(model, tmp_path):
    file = tmp_path / "held_out.txt"
    file.write_text(TEXT)
    assert_same(evaluate(model, str(file)), evaluate(model, TEXT))
    with pytest.raises(DataError, match="no source"):
        evaluate(model, str(tmp_path / "held_put.txt"))
    assert evaluate(model, [TEXT, TEXT])["documents"] == 2
    assert evaluate(model, "a word and a half")["bytes"] == 17
    with pytest.raises(ConfigError, match="name a text or a source"):
        evaluate(model)


def test_evaluation_compiles_once(model):
    evaluate(model, TEXT)
    before = eval_step_of(model)._cache_size()
    evaluate(model, TEXT * 5)
    evaluate(dataclasses.replace(model, params=jax.tree.map(jnp.copy, model.params)), TEXT)
    assert eval_step_of(model)._cache_size() == before
