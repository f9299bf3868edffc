"""The pass key, and how tasks come through the pipeline and the evaluation."""

import dataclasses
import re

import numpy as np
import pytest

from slm.config import DataConfig, Experiment, check, override
from slm.data.evaluation import open_evaluation
from slm.data.pipeline import open_data
from slm.data.synthetic import SyntheticRows, synthetic_tokenizer
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError, DataError
from slm.evaluation.bits_per_byte import evaluate_batches
from slm.training.run import filled_in

ASKED = re.compile(
    r"(.*) The pass key is (\d+)\. Remember it\. \2 is the pass key\. (.*) What is the pass key\? .* is \2"
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passkey")
    (folder / "texts").mkdir()
    for i in range(20):
        (folder / "texts" / f"{i:02}.txt").write_text(f"{chr(97 + i)}" * 90)
    spec = f"synthetic:passkey:text={folder / 'texts'},length=256"
    return DataConfig(source=(spec,), validation_fraction=0.3, sequence_length=256, cache=str(folder / "cache"))


def read(rows, tokenizer, indices=range(40)):
    """(text, said digits) of each row of a batch."""
    batch = rows.read(np.array(indices))
    for tokens, targets, weights, segments in zip(*(batch[n] for n in ("tokens", "targets", "weights", "segment_ids"))):
        n = segments.sum()
        np.testing.assert_array_equal(tokens[1:n], targets[: n - 1])
        yield tokenizer.decode(targets[:n]), tokenizer.decode(targets[weights > 0]), n


@pytest.mark.parametrize("kind", ["bytes", "bpe:280"])
def test_the_key_is_hidden_in_text_and_asked_for(settings, kind):
    data = open_data(dataclasses.replace(settings, tokenizer=kind), 0)
    depths = []
    for text, said, n in read(data.train[0], data.tokenizer):
        before, key, after = ASKED.fullmatch(text).groups()
        assert said == key
        assert len(key) == 5
        assert n == 256
        assert not set(before + after) - set("abcdefghijklmnopqrst")
        depths.append(len(before) / len(before + after))
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert len({said for _, said, _ in read(data.train[0], data.tokenizer)}) > 35


def test_sides_hide_keys_in_texts_of_their_own(settings):
    data = open_data(settings, 0)
    letters = [set(), set()]
    for found, rows in zip(letters, (data.train[0], data.validation.rows[0])):
        for text, _, _ in read(rows, data.tokenizer, range(200)):
            before, _, after = ASKED.fullmatch(text).groups()
            found |= set(before + after)
    assert min(map(len, letters)) > 3
    assert not letters[0] & letters[1]
    assert open_data(dataclasses.replace(settings, sequence_length=300), 0).fingerprint != data.fingerprint


def test_depth_digits_and_length(settings):
    spec = f"{settings.source[0]},depth=0.25,digits=7,tests=4".replace("length=256", "length=200")
    data = open_data(dataclasses.replace(settings, validation=(spec,)), 0)
    (rows,) = data.validation.rows
    assert len(rows) == 4
    for text, said, n in read(rows, data.tokenizer, range(4)):
        before, _, after = ASKED.fullmatch(text).groups()
        assert len(before) == pytest.approx(len(before + after) / 4, abs=1)
        assert (len(said), n) == (7, 200)
    with pytest.raises(DataError, match=r"needs data\.sequence_length and its own length of at least 1\d\d, not 90"):
        open_data(dataclasses.replace(settings, source=(f"{settings.source[0].replace('256', '90')}",)), 0)


def test_it_mixes_with_text_and_any_model_of_text_can_be_asked(settings):
    texts = re.search("text=([^,]*)", settings.source[0])[1]
    data = open_data(dataclasses.replace(settings, source=(texts, settings.source[0]), sequence_length=300), 0)
    batch = data.train_batch(0, 8)
    assert sorted(batch["weights"].sum(axis=1).tolist())[:4] == [5] * 4
    # The text around a question may have been trained on.
    known = dataclasses.replace(settings, source=(texts,), validation=settings.source)
    assert open_data(known, 0).validation.sources == ((settings.source[0], 1024, True),)
    evaluation = open_evaluation(settings.source[0], settings, data.tokenizer, 256)
    assert evaluation.sequences == 1024
    with pytest.raises(ConfigError, match="do not mix with text"):
        open_data(dataclasses.replace(settings, source=(settings.source[0], "synthetic:mqar")), 0)


def test_lengths_mix_and_validation_may_be_longer():
    short, long = "synthetic:mqar:pairs=4,length=64,vocab=512", "synthetic:mqar:pairs=8,length=128,vocab=512"
    data = DataConfig(source=(short, long), weights=(3.0, 1.0), validation=(long,), sequence_length=128)
    batch = open_data(data, 0).train_batch(0, 8)
    assert sorted(batch["segment_ids"].sum(axis=1).tolist()) == [64] * 6 + [128] * 2
    assert sorted(batch["weights"].sum(axis=1).tolist()) == [4] * 6 + [8] * 2
    with pytest.raises(DataError, match=r"needs data\.sequence_length of at least 128, not 64"):
        open_data(dataclasses.replace(data, sequence_length=64), 0)
    apart = dataclasses.replace(data, source=(short,), weights=(), sequence_length=64)
    with pytest.raises(DataError, match=r"at least 128, not 64 \(or data\.validation_length"):
        open_data(apart, 0)
    longer = open_data(dataclasses.replace(apart, validation_length=128), 0)
    assert longer.train_batch(0, 2)["tokens"].shape == (2, 64)
    assert next(longer.validation_batches(2))["tokens"].shape == (2, 128)


def test_vocabularies_must_be_equal():
    specs = ("synthetic:mqar:vocab=512", "synthetic:mqar:vocab=256")
    with pytest.raises(ConfigError, match="vocabulary of 512 words and synthetic:mqar:vocab=256 another of 256"):
        open_data(DataConfig(source=specs), 0)
    with pytest.raises(ConfigError, match="another of 81"):
        open_data(DataConfig(source=specs[:1], validation=("synthetic:copy",)), 0)
    with pytest.raises(ConfigError, match="a vocabulary of its own, of 256 words"):
        open_evaluation(specs[1], DataConfig(), synthetic_tokenizer(specs[0]), 64)


def test_finite_sets_come_again_each_epoch():
    data = open_data(DataConfig(source=("synthetic:mad_memorisation:samples=6",), sequence_length=32), 0)
    epochs = [np.unique(data.train_batch(epoch, 6)["tokens"], axis=0) for epoch in range(2)]
    assert epochs[0].shape == (6, 32)
    np.testing.assert_array_equal(*epochs)


def test_text_may_be_validated_on_longer_windows(tmp_path):
    (tmp_path / "text.txt").write_text("a sentence. " * 50)
    data = DataConfig(
        source=(str(tmp_path / "text.txt"),),
        validation_split="tail",
        sequence_length=8,
        validation_length=24,
        cache=str(tmp_path / "cache"),
    )
    opened = open_data(data, 0, build_tokenizer("bytes", None))
    assert next(opened.validation_batches(1))["tokens"].shape == (1, 24)
    assert opened.train_batch(0, 1)["tokens"].shape == (1, 8)
    plain = open_data(dataclasses.replace(data, validation_length=None), 0, opened.tokenizer)
    assert plain.fingerprint != opened.fingerprint


def test_learned_positions_reach_the_longest_sequence():
    cfg = override(Experiment(), {"model.position": "learned", "data.validation_length": 512})
    assert filled_in(cfg, 100).model.max_length == 512
    with pytest.raises(ConfigError, match=r"max_length = 300 is less than .* data\.validation_length = 512"):
        check(override(cfg, {"model.max_length": 300}))


def test_scores_by_source_and_exact_match():
    """Of a model that is right at every answer of the first source, and at the first answer of each other sample."""
    specs = [f"synthetic:mqar:vocab=64,length=16,pairs={pairs},tests=30,weigh=samples" for pairs in (1, 4)]
    data = open_data(DataConfig(source=(specs[0],), validation=tuple(specs), sequence_length=16), 0)

    def step(params, batch):
        weights = np.asarray(batch["weights"])
        answers = np.cumsum(weights > 0, axis=1)
        return {"nats": answers.astype(np.float32), "correct": answers <= 1}

    def score(specs):
        rows = tuple(SyntheticRows(spec, 0, 16, "validation") for spec in specs)
        evaluation = dataclasses.replace(data.validation, rows=rows)
        return evaluate_batches(step, None, evaluation.batches(8), sources=evaluation.sources)

    both = score(specs)
    assert both["exact_match"] == 0.5
    assert both["accuracy"] == pytest.approx((1 + 0.25) / 2)
    first, second = (both["by_source"][spec] for spec in specs)
    assert (first["accuracy"], first["exact_match"], first["loss"]) == pytest.approx((1, 1, 1))
    assert (second["accuracy"], second["exact_match"], second["loss"]) == pytest.approx((0.25, 0, 2.5))
    assert first["tokens"] == second["tokens"] == 30
    alone = score(specs[1:])
    assert "by_source" not in alone
    assert alone["accuracy"] == second["accuracy"]
    assert "exact_match" not in evaluate_batches(step, None, data.validation.batches(8))
