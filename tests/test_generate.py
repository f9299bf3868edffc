import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.config import Experiment, MixerConfig, ModelConfig
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError
from slm.evaluation import decoding as decoder
from slm.evaluation.decoding import Decoding
from slm.evaluation.generate import generate, generate_tokens, stream
from slm.evaluation.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, make_sampling, sample
from slm.evaluation.text_stream import TextStream
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

TINY = ModelConfig(
    vocab_size=320,
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    attention=("window", "softmax"),
    mixer=MixerConfig(window=5),
    init_std=0.5,
)
GREEDY = make_sampling(temperature=0)


def initialised(cfg):
    """A transformer and random parameters, drawn in numpy because that compiles nothing."""
    transformer, rng = Transformer(cfg), np.random.default_rng(0)
    shapes = jax.eval_shape(transformer.init, jax.random.key(0))
    return transformer, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def tiny():
    return initialised(TINY)


@pytest.fixture(scope="module")
def model(tiny):
    """A random model of bytes, whose embedding has more rows than the tokenizer has ids."""
    return LanguageModel(tiny[1], Experiment(model=TINY), build_tokenizer("bytes", lambda: iter(())))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 320, n).astype(np.int32) for n in (9, 1, 4)]


def greedy_by_forward(transformer, params, prompts, count):
    """Greedy continuations, each token from a forward pass over everything before it."""

    @jax.jit
    def forward(tokens):
        return transformer.logits(params, transformer.hidden(params, tokens)[0]).argmax(-1)

    rows = np.arange(len(prompts))
    at = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), at.max() + count), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    for i in range(count):
        tokens[rows, at + i] = forward(tokens)[rows, at + i - 1]
    return [row[n : n + count].tolist() for row, n in zip(tokens, at)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "layers": 1,
            "attention": ("softmax",),
            "mixer": MixerConfig(),
            "kv_heads": None,
            "scan": False,
            "tied": False,
        },
        {"layers": 3, "attention": ("window",) * 2, "position": "learned", "max_length": 32, "norm": "layernorm"},
    ],
    ids=["mixed", "softmax", "window"],
)
def test_cached_greedy_decoding_equals_full_forward_passes(changes, prompts):
    transformer, params = initialised(dataclasses.replace(TINY, **changes))
    rows = generate_tokens(transformer, params, prompts, max_new_tokens=12, sampling=GREEDY)
    rows = [row.tolist() for row in rows]
    assert rows == greedy_by_forward(transformer, params, prompts, 12)
    assert len(set(map(tuple, rows))) == 3  # else the test could not see rows mixed up
    assert max(len(set(row)) for row in rows) > 2


def test_prefill_and_decode_logits_equal_the_forward_pass(tiny):
    transformer, params = tiny

    @jax.jit
    def forward(tokens, **arguments):
        hidden, cache = transformer.hidden(params, tokens, **arguments)
        return transformer.logits(params, hidden), cache

    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 320)
    want, _ = forward(tokens)
    # The second row's prompt is shorter and padded on the right; decoding then goes on at each row's own position.
    lengths, rows = np.array([9, 7]), np.arange(2)
    positions = np.where(np.arange(9) < lengths[:, None], np.arange(9), -1)
    got, cache = forward(tokens[:, :9], positions=positions, cache=transformer.init_cache(2, 32))
    np.testing.assert_allclose(got[rows, lengths - 1], want[rows, lengths - 1], atol=1e-4)
    for at in lengths + np.arange(7)[:, None]:
        got, cache = forward(tokens[rows, at][:, None], positions=at[:, None], cache=cache)
        np.testing.assert_allclose(got[:, 0], want[rows, at], atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_decode_step_equal_those_of_a_sequence(tied):
    transformer, params = initialised(dataclasses.replace(TINY, tied=tied, logit_softcap=2.0))
    hidden = jax.random.normal(jax.random.key(1), (3, 16))
    np.testing.assert_allclose(
        transformer.logits(params, hidden), transformer.logits(params, hidden[:, None])[:, 0], atol=1e-5
    )


def test_a_row_does_not_depend_on_the_batch_around_it(tiny, prompts):
    transformer, params = tiny
    settings = {"max_new_tokens": 8, "sampling": make_sampling(temperature=0.8, top_k=10)}
    rows = generate_tokens(transformer, params, prompts, seed=3, **settings)
    for r, prompt in enumerate(prompts):
        (alone,) = generate_tokens(transformer, params, [prompt], seed=3 + r, **settings)
        assert rows[r].tolist() == alone.tolist()
    same = generate_tokens(transformer, params, [prompts[0]] * 3, seed=3, **settings)
    assert same[0].tolist() != same[1].tolist()  # rows have streams of their own


def test_rows_stop_at_end_of_text_and_the_loop_stops_with_the_last(tiny, prompts):
    transformer, params = tiny
    full = generate_tokens(transformer, params, prompts, max_new_tokens=12, sampling=GREEDY)
    end = int(full[0][4])
    rows = generate_tokens(transformer, params, prompts, max_new_tokens=12, sampling=GREEDY, end_of_text=end)
    for row, whole in zip(rows, full):
        whole = whole.tolist()
        assert row.tolist() == (whole[: whole.index(end)] if end in whole else whole)
    assert len(rows[0]) <= 4


def test_several_ids_end_a_row(tiny, prompts):
    transformer, params = tiny
    settings = {"max_new_tokens": 12, "sampling": GREEDY}
    (full,) = generate_tokens(transformer, params, prompts[:1], **settings)
    full = full.tolist()
    ends = [*range(1000, 1008), full[7], full[4]]  # more than one bucket of them
    (row,) = generate_tokens(transformer, params, prompts[:1], end_of_text=ends, **settings)
    assert row.tolist() == full[: min(full.index(full[7]), full.index(full[4]))]


def test_pieces_are_the_whole_and_a_finished_row_stays_so(tiny, prompts):
    transformer, params = tiny
    settings = {"max_new_tokens": 12, "sampling": make_sampling(0.9)}
    whole = generate_tokens(transformer, params, prompts, **settings)
    decoding, rows = Decoding(transformer, params, prompts, **settings), [[], [], []]
    for count in (1, 3, 5, 9):
        for row, ids in zip(rows, decoding.advance(count)):
            assert len(ids) <= count
            row.extend(ids.tolist())
    assert decoding.finished
    assert rows == [row.tolist() for row in whole]

    decoding = Decoding(transformer, params, prompts, **settings)
    decoding.advance(2)
    decoding.finish(np.array([False, True, False]))
    assert [len(ids) for ids in decoding.advance(4)] == [4, 0, 4]
    decoding.finish(np.array([True, False, True]))
    assert decoding.finished


def test_ids_beyond_the_tokenizer_are_never_drawn(tiny, prompts):
    transformer, params = tiny
    settings = {"max_new_tokens": 40, "sampling": make_sampling(temperature=5.0)}
    free = generate_tokens(transformer, params, prompts, **settings)
    assert max(row.max() for row in free) > 300
    assert all(len(set(row.tolist())) > 10 for row in free)  # each step draws anew
    assert max(row.max() for row in generate_tokens(transformer, params, prompts, vocab_size=257, **settings)) < 257


def test_settings_and_near_lengths_share_a_compilation(tiny, prompts):
    transformer, params = tiny
    sizes = []
    for prompt, count, settings in [
        (prompts[0], 3, {}),
        (prompts[1], 9, {"temperature": 0}),
        (prompts[2], 64, {"temperature": 2, "top_k": 4, "top_p": 0.5, "min_p": 0.1}),
    ]:
        generate_tokens(transformer, params, [prompt], max_new_tokens=count, sampling=make_sampling(**settings))
        sizes.append((decoder._prefill._cache_size(), decoder._decode._cache_size()))
    assert sizes[0] == sizes[-1]
    assert min(sizes[0]) > 0


def test_bfloat16_cache(tiny, prompts):
    transformer, params = tiny
    cache = transformer.init_cache(1, 8, jnp.bfloat16)
    assert cache["blocks"]["0"]["key"].dtype == jnp.bfloat16
    settings = {"max_new_tokens": 4, "sampling": GREEDY}
    want = generate_tokens(transformer, params, prompts, **settings)
    got = generate_tokens(transformer, params, prompts, cache_dtype=jnp.bfloat16, **settings)
    assert sum(int(a[0] == b[0]) for a, b in zip(got, want)) >= 2
    assert [len(row) for row in got] == [4, 4, 4]


def test_generate_text(model):
    text = generate(model, "ab", max_new_tokens=8, temperature=0)
    ids = generate_tokens(
        model.transformer,
        model.params,
        [np.array([256, 97, 98], np.int32)],
        max_new_tokens=8,
        sampling=GREEDY,
        end_of_text=256,
        vocab_size=257,
    )
    assert text == model.tokenizer.decode(ids[0])
    texts = generate(model, ["ab", "", "ß"], max_new_tokens=8, temperature=0)
    assert isinstance(texts, list)
    assert texts[0] == text
    assert texts[1] == generate(model, "", max_new_tokens=8, temperature=0)
    assert generate(model, []) == []


class Letters:
    """A tokenizer whose ids are UTF-8 bytes, for TextStream."""

    decode = staticmethod(lambda ids: bytes(ids).decode("utf-8", "replace"))


def pieces_of(data, sizes, stop=()):
    text, at, found = TextStream(Letters, stop), 0, []
    for size in sizes:
        found.append(text.push(data[at : at + size]))
        at += size
    return [*found, text.push(data[at:]), text.close()], text.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_streamed_text_has_whole_characters_only(size):
    text = "naïve 漢字 🎉🎉 é\n" * 5
    data = text.encode()
    pieces, _ = pieces_of(data, [size] * (len(data) // size))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 10
    broken = b"a\xff\xe2\x82b\xf0\x9f"
    pieces, _ = pieces_of(broken, [size] * (len(broken) // size))
    assert "".join(pieces) == broken.decode("utf-8", "replace")


def test_streamed_text_costs_no_more_when_it_is_long():
    class Counting:
        longest = 0

        @classmethod
        def decode(cls, ids):
            cls.longest = max(cls.longest, len(ids))
            return bytes(ids).decode("utf-8", "replace")

    text = TextStream(Counting)
    assert "".join([*(text.push([97]) for _ in range(500)), text.close()]) == "a" * 500
    assert Counting.longest < 5


def test_streamed_text_keeps_the_spaces_that_a_decoder_strips_at_the_start():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.WordLevel({"▁a": 0, "▁bc": 1, "<e>": 2}))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<e>"])
    from slm.data.tokenizers import Tokenizer

    tokenizer = Tokenizer(backend)
    ids = [2, 0, 1, 2, 2, 1, 0, 2, 0]
    for size in (1, 2, 4):
        text = TextStream(tokenizer)
        pieces = [text.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join([*pieces, text.close()]) == tokenizer.decode(ids) == "a bc bc a a"


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        (("\n\n",), "one\ntwo"),
        (("zzz",), None),
        (("two", "one\ntwo"), ""),  # both are complete at the same place: the longer began first
        (("\nt", "wo\n"), "one"),
        (("e\ntwo\n\nx", "o\n"), "one\ntw"),  # one that began earlier but never came to its end
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_text_ends_before_the_first_stop_string_however_it_is_cut(stop, want, size):
    text = "one\ntwo\n\nthree\n\n"
    pieces, stopped = pieces_of(text.encode(), [size] * (len(text) // size), stop)
    assert "".join(pieces) == (text if want is None else want)
    assert stopped == (want is not None)
    assert pieces[-1] == "" or not stopped


def test_generation_stops_soon_after_a_stop_string(model, monkeypatch):
    settings = {"max_new_tokens": 60, "temperature": 1.0}
    prompts = ["ab", "c", "d"]
    free = generate(model, prompts, **settings)
    stop = (free[0][5:7], free[1][11:13])
    wanted = [min(text[: text.find(s)] if s in text else text for s in stop) for text in free]
    assert wanted[0] != free[0] != ""
    assert wanted[1] != free[1]
    drawn = []
    advance = Decoding.advance
    monkeypatch.setattr(Decoding, "advance", lambda self, n: drawn.append(n) or advance(self, n))
    assert generate(model, prompts, stop=stop, **settings) == wanted
    drawn.clear()
    assert generate(model, "ab", stop=stop[0], **settings) == wanted[0]
    assert sum(drawn) < 30


def test_stream_gives_what_generate_gives_in_pieces(model):
    settings = {"max_new_tokens": 40, "temperature": 0.8, "seed": 5}
    whole = generate(model, "ab", **settings)
    pieces = list(stream(model, "ab", **settings))
    assert "".join(pieces) == whole
    assert len(pieces) > 4
    assert all(pieces)
    stop = whole[9:11]
    assert "".join(stream(model, "ab", stop=[stop], **settings)) == generate(model, "ab", stop=stop, **settings)
    with pytest.raises(ConfigError, match="temperature"):
        stream(model, "ab", temperature=-1)  # at the call
    with pytest.raises(ConfigError, match="stop = "):
        stream(model, "ab", stop=("",))


def test_seed_decides(model):
    draws = [generate(model, "a", max_new_tokens=16, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature = -1"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"min_p": 2}, "min_p = 2"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
    ],
)
def test_bad_settings_are_named(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, "a", **settings)


def test_learned_positions_are_not_exceeded(model):
    cfg = dataclasses.replace(model.config.model, position="learned", max_length=10)
    learned = LanguageModel(initialised(cfg)[1], Experiment(model=cfg), model.tokenizer)
    decoder.check_length(learned.transformer, 4, 6)
    with pytest.raises(ConfigError, match=r"exceed the 10 learned positions.*at most 6"):
        generate(learned, "abc", max_new_tokens=7)
    with pytest.raises(ConfigError, match="shorten the prompt"):
        generate(learned, "a" * 20, max_new_tokens=1)


def test_an_empty_prompt_needs_an_end_of_text(model):
    class WithoutEnd:
        end_of_text = None
        vocab_size = 257
        encode = staticmethod(model.tokenizer.encode)

    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate(dataclasses.replace(model, tokenizer=WithoutEnd()), "")


# Filters, against the definitions written out in numpy.


def naive_top_k(row, k):
    return row >= sorted(row)[-k]


def naive_top_p(row, p):
    probability = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
    for level in sorted(set(row), reverse=True):
        kept = row >= level
        if probability[kept].sum() > p:
            return kept
    return np.ones_like(row, bool)


def naive_min_p(row, p):
    probability = np.exp(row) / np.exp(row).sum()
    return probability >= p * probability.max() * (1 - 1e-6)


def logits_with_ties():
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(3, 50)).astype(np.float32) * 3
    coarse = np.round(smooth)  # many ties
    return np.concatenate([smooth, coarse, -np.abs(smooth), np.zeros((1, 50), np.float32)])


@pytest.mark.parametrize(
    ("keep", "naive", "strengths"),
    [
        (keep_top_k, naive_top_k, [1, 2, 7, 49, 50]),
        (keep_top_p, naive_top_p, [0.01, 0.3, 0.9, 0.999]),
        (keep_min_p, naive_min_p, [0.01, 0.3, 1.0]),
    ],
)
def test_filters_equal_their_definitions(keep, naive, strengths):
    logits = logits_with_ties()
    jitted = jax.jit(keep)
    for strength in strengths:
        got = np.asarray(jitted(logits, strength))
        want = np.stack([naive(row, strength) for row in logits])
        np.testing.assert_array_equal(got > -np.inf, want, err_msg=str(strength))
        np.testing.assert_array_equal(got[want], logits[want])


@pytest.mark.parametrize(("keep", "off"), [(keep_top_k, 0), (keep_top_k, 999), (keep_top_p, 1.0), (keep_min_p, 0.0)])
def test_filters_that_are_off_keep_all(keep, off):
    logits = logits_with_ties() * 20  # so that most probabilities vanish in float32
    np.testing.assert_array_equal(keep(logits, jnp.asarray(off)), logits)


def test_rows_may_have_settings_of_their_own():
    rng = np.random.default_rng(0)
    settings = [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}, {"temperature": 0.1, "top_k": 9}]
    rows = [make_sampling(**one) for one in settings]
    logits = jnp.asarray(rng.normal(size=(len(rows), 50)) * 2, jnp.float32)
    together = Sampling(*(np.asarray(x, t) for x, t in zip(zip(*rows), (np.float32, np.int32, np.float32, np.float32))))
    draw = jax.jit(sample)
    differing = 0
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), len(rows))
        got = draw(keys, logits, together)
        alone = [int(draw(keys[r : r + 1], logits[r : r + 1], one)[0]) for r, one in enumerate(rows)]
        assert got.tolist() == alone
        differing += got.tolist() != draw(keys, logits, rows[0]).tolist()
    assert differing > 10


@pytest.mark.parametrize(("keep", "off", "on"), [(keep_top_k, 0, 3), (keep_top_p, 1.0, 0.5), (keep_min_p, 0.0, 0.2)])
def test_a_filter_that_is_off_for_one_row_keeps_all_of_it(keep, off, on):
    logits = logits_with_ties()[:3] * 20  # so that most probabilities vanish in float32
    got = keep(logits, jnp.asarray([on, off, on]))
    np.testing.assert_array_equal(got[1], logits[1])
    np.testing.assert_array_equal(got, jnp.stack([keep(logits[:1], on)[0], logits[1], keep(logits[2:], on)[0]]))
    assert (got == -jnp.inf).any(-1).tolist() == [True, False, True]


def test_sample_draws_from_the_filtered_distribution():
    logits = jnp.log(jnp.array([0.4, 0.05, 0.3, 0.05, 0.2]))
    n = 4000
    keys = jax.random.split(jax.random.key(0), n)
    draw = jax.jit(sample)

    def frequencies(**settings):
        drawn = draw(keys, jnp.tile(logits, (n, 1)), make_sampling(**settings))
        return np.bincount(drawn, minlength=5) / n

    def expected(weights):
        return np.array(weights) / np.sum(weights)

    three_sigma = 3 * 0.5 / n**0.5
    for settings, weights in [
        ({}, [0.4, 0.05, 0.3, 0.05, 0.2]),
        ({"temperature": 0.5}, [0.16, 0.0025, 0.09, 0.0025, 0.04]),
        ({"top_k": 2}, [0.4, 0, 0.3, 0, 0]),
        ({"top_p": 0.75}, [0.4, 0, 0.3, 0, 0.2]),
        ({"min_p": 0.4}, [0.4, 0, 0.3, 0, 0.2]),
        # Top-p counts what top-k left: 0.4/0.7 reaches 0.5 alone.
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0, 0]),
    ]:
        got, want = frequencies(**settings), expected(weights)
        np.testing.assert_allclose(got, want, atol=three_sigma, err_msg=str(settings))
        np.testing.assert_array_equal(got[want == 0], 0, err_msg=str(settings))
