"""What a teacher said, on disk: the same curve as with the teacher itself, windows, kills, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny
from tiny_teacher import distilling, program, sharp

from slm.compress import cache_teacher as writer
from slm.compress.cache_teacher import cache_teacher
from slm.compress.distill import CACHED
from slm.compress.teacher import check_teacher, teaching
from slm.compress.teacher_cache import open_cached
from slm.config import override
from slm.data.pipeline import open_data
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError, DataError
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer
from slm.training.run import filled_in

STEPS = 20


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("cached")


def experiment(home, **changes):
    names = {"train.steps": STEPS, "distill.cached": "nowhere", "data.packing": "documents"}
    cfg = tiny(home, names | {name.replace("__", "."): value for name, value in changes.items()})
    return filled_in(cfg, build_tokenizer("bytes", list).vocab_size)


def make_teacher(cfg, seed=5, **model):
    shape = dataclasses.replace(cfg.model, **({"layers": 3, "width": 48, "heads": 4} | model))
    params = sharp(jax.jit(Transformer(shape).init)(jax.random.key(seed)), 12.0)
    named = dataclasses.replace(cfg, name="teacher", model=shape)
    return LanguageModel(params, named, build_tokenizer("bytes", list))


@pytest.fixture(scope="module")
def teacher(home):
    return make_teacher(experiment(home))


def curve(cfg, program, teacher_params=(), cached=None):
    data = open_data(cfg.data, cfg.seed)
    state, losses = program.init(jax.random.key(0)), []
    for step in range(STEPS):
        batch = data.train_batch(step, cfg.train.batch_size)
        if cached is not None:
            batch |= cached.read(*data.drawn(step, cfg.train.batch_size))
        state, metrics = program.train(state, batch, *teacher_params)
        losses.append([float(metrics["loss"]), float(metrics["divergence"])])
    return np.array(losses)


def cached_curve(cfg):
    data = open_data(cfg.data, cfg.seed)
    found = teaching(cfg, Transformer(cfg.model), data)
    assert found.params is None
    return curve(cfg, program(cfg, found.objective(cfg), None, found.extra_batch), cached=found.cached)


def test_the_curve_is_that_of_the_teacher_itself(home, teacher):
    """E K3: with all tokens cached to 1e-5; with the likeliest 32 within 1 %."""
    cfg = experiment(home)
    online = curve(cfg, distilling(cfg, teacher.transformer), (teacher.params,))
    assert online[-1, 0] < online[0, 0] - 0.2
    every = cache_teacher(teacher, cfg, home / "every", top_k=cfg.model.vocab_size, dtype="float32")
    assert every["left_out"] < 1e-6
    np.testing.assert_allclose(cached_curve(override(cfg, {"distill.cached": str(home / "every")})), online, rtol=1e-5)
    few = cache_teacher(teacher, cfg, home / "few", top_k=32)
    assert few["bytes_per_token"] == 4 * 32 + 2
    assert 0.001 < few["left_out"] < 0.5
    near = cached_curve(override(cfg, {"distill.cached": str(home / "few")}))
    np.testing.assert_allclose(near[:, 0], online[:, 0], rtol=0.01)


def test_each_window_says_what_the_teacher_says_of_it(home, teacher):
    """Against one forward pass of the window alone, whatever stood beside it when it was written."""
    cfg = experiment(home)
    data = open_data(cfg.data, cfg.seed)
    cache_teacher(teacher, cfg, home / "whole", top_k=5, whole=True)
    cached = open_cached(home / "whole", data, cfg.data.sequence_length)
    rows = np.array([len(data.train[0]) - 1, 0, 17])
    got, batch = cached.read(np.zeros(3, np.int64), rows), data.train[0].read(rows)
    for row in range(3):
        one = {name: jnp.asarray(batch[name][row : row + 1]) for name in ("tokens", "segment_ids", "positions")}
        hidden, _ = teacher.transformer.hidden(
            teacher.params, one["tokens"], segment_ids=one["segment_ids"], positions=one["positions"]
        )
        p = np.exp(np.asarray(jax.nn.log_softmax(teacher.transformer.logits(teacher.params, hidden)), np.float64))[0]
        ids = got[CACHED[0]][row]
        np.testing.assert_array_equal(np.sort(ids, -1), np.sort(np.argsort(-p, -1)[:, :5], -1))
        np.testing.assert_allclose(got[CACHED[1]][row], np.log(np.take_along_axis(p, ids, -1)), atol=4e-3)
        rest = p.sum(-1) - np.take_along_axis(p, ids, -1).sum(-1)
        np.testing.assert_allclose(got[CACHED[2]][row], np.log(rest), atol=4e-3)


def test_a_killed_writer_goes_on(home, teacher, monkeypatch):
    """Killed in the middle of a record: the bytes are in the end those of a writer that was left alone."""
    cfg = experiment(home)
    cache_teacher(teacher, cfg, home / "alone", top_k=3)
    whole = (home / "alone" / "source_0.bin").read_bytes()
    said, calls = writer._say, []

    def say(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return said(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_say", say)
        with pytest.raises(KeyboardInterrupt):
            cache_teacher(teacher, cfg, home / "killed", top_k=3)
    path = home / "killed" / "source_0.bin"
    path.write_bytes(path.read_bytes()[:-7])
    assert 0 < path.stat().st_size < len(whole)
    data = open_data(cfg.data, cfg.seed)
    with pytest.raises(DataError, match=r"is not complete: \d+ of \d+ windows .* run slm.cache_teacher again"):
        open_cached(home / "killed", data, cfg.data.sequence_length)
    done = []
    cache_teacher(teacher, cfg, home / "killed", top_k=3, progress=lambda now, of: done.append(now))
    assert path.read_bytes() == whole
    assert done[0] == 2 * writer.ROWS  # the first of the batches that were written was not asked for again
    again = []
    cache_teacher(teacher, cfg, home / "killed", top_k=3, progress=lambda now, of: again.append(now))
    assert not again


def test_another_cache_is_not_continued(home, teacher):
    cfg = experiment(home)
    cache_teacher(teacher, cfg, home / "first", top_k=3)
    with pytest.raises(DataError, match=r"holds a cache of something else \(top_k differ\)"):
        cache_teacher(teacher, cfg, home / "first", top_k=4)
    with pytest.raises(DataError, match=r"\(teacher differ\)"):
        cache_teacher(make_teacher(cfg, seed=6), cfg, home / "first", top_k=3)
    with pytest.raises(DataError, match=r"windows differ\)|\(windows"):
        cache_teacher(teacher, experiment(home, seed=3, train__steps=21), home / "first", top_k=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__sequence_length": 8}, r"written for another data.sequence_length \(16, now 8\)"),
        ({"data__tokenizer": "chars"}, r"written for another data.tokenizer"),
        ({"data__packing": "stream"}, r"written for another data.source, data.packing or another field"),
        ({"model__head": "masked_lm", "model__causal": False}, r"distill.cached with model.head = masked_lm"),
    ],
)
def test_what_differs_is_named(home, teacher, changes, message):
    cfg = experiment(home)
    if not (home / "named").exists():
        cache_teacher(teacher, cfg, home / "named", top_k=3)
    cfg = experiment(home, **changes, distill__cached=str(home / "named"))
    with pytest.raises((DataError, ConfigError), match=message):
        teaching(cfg, Transformer(cfg.model), open_data(cfg.data, cfg.seed))


def test_windows_that_are_not_there_are_named(home, teacher):
    cfg = experiment(home)
    cache_teacher(teacher, experiment(home, train__steps=1), home / "little", top_k=3)
    data = open_data(cfg.data, cfg.seed)
    cached = open_cached(home / "little", data, cfg.data.sequence_length)
    assert len(cached.read(*data.drawn(0, 4))[CACHED[0]]) == 4
    with pytest.raises(DataError, match=r"lacks window \d+ of source 0: .* another seed"):
        cached.read(*data.drawn(1, 4))


def test_folders_that_are_no_caches(home, teacher):
    cfg = experiment(home)
    data = open_data(cfg.data, cfg.seed)
    with pytest.raises(DataError, match=r"has no header.json: write it with slm.cache_teacher"):
        open_cached(home / "none", data, 16)
    with pytest.raises(DataError, match="is not empty and holds no cache"):
        cache_teacher(teacher, cfg, home, top_k=3)
    with pytest.raises(ConfigError, match=r"top_k = 300: must be from 1 to the 257 ids"):
        cache_teacher(teacher, cfg, home / "large", top_k=300)
    synthetic = override(cfg, {"data.source": ("synthetic:induction",), "model.vocab_size": 0})
    own = open_data(synthetic.data, 0).tokenizer
    with pytest.raises(ConfigError, match="synthetic tasks draw other sequences"):
        cache_teacher(dataclasses.replace(teacher, tokenizer=own), synthetic, home / "synthetic", top_k=3)
    cache_teacher(teacher, cfg, home / "hurt", top_k=3)
    header = home / "hurt" / "header.json"
    header.write_text(header.read_text()[:20])
    with pytest.raises(DataError, match="is damaged"):
        open_cached(home / "hurt", data, 16)
    header.write_text(json.dumps({}))
    with pytest.raises(DataError, match="another format of caches"):
        open_cached(home / "hurt", data, 16)


def test_teachers_that_do_not_fit(home):
    cfg = experiment(home, distill__cached=None, distill__teacher="runs/big")
    bytes_ = build_tokenizer("bytes", list)

    def refuse(model, message, student=cfg, tokenizer=bytes_):
        with pytest.raises(ConfigError, match=message):
            check_teacher(model, student, tokenizer)

    good = make_teacher(cfg)
    check_teacher(good, cfg, bytes_)
    chars = build_tokenizer("chars", lambda: ["abc"])
    refuse(dataclasses.replace(good, tokenizer=chars), "another tokenizer, .*sample_teacher")
    refuse(dataclasses.replace(good, tokenizer=None), "has no tokenizer")
    padded = make_teacher(cfg, vocab_size=cfg.model.vocab_size + 7)
    refuse(padded, r"model.vocab_size = 264 and the student 257: .* distill.pad_vocabulary")
    check_teacher(padded, override(cfg, {"distill.pad_vocabulary": True}), bytes_)
    refuse(
        make_teacher(cfg, vocab_size=200),
        "200 ids, fewer than the 257",
        override(cfg, {"distill.pad_vocabulary": True}),
    )
    refuse(make_teacher(cfg, causal=False, head="masked_lm"), "model.head = masked_lm, the student lm")
    refuse(make_teacher(cfg, position="learned", max_length=8), "8 learned positions, fewer than .* = 16")


def test_a_teacher_is_opened_in_the_students_dtype(home, monkeypatch):
    cfg = experiment(home, distill__cached=None, distill__teacher="runs/big")
    good = make_teacher(cfg)
    monkeypatch.setattr("slm.evaluation.opening.open_model", lambda path: {"runs/big": good}[path])
    found = teaching(cfg, Transformer(cfg.model, jnp.bfloat16), open_data(cfg.data, cfg.seed))
    assert found.cached is None
    assert found.extra_batch == {}
    assert found.params["embed"]["embedding"].dtype == jnp.bfloat16
