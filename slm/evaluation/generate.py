"""Text from a model: prefill through the cache, then a jitted loop that draws a token and feeds it back.

The loop runs to the end of the continuation where only tokens can end it, and a few tokens at a time where somebody
reads along: a stream, or stop strings, which are sought in decoded text.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import ConfigError
from slm.evaluation.borders import end_ids, prompt_ids
from slm.evaluation.sampling import Sampling, make_sampling, sample
from slm.evaluation.text_stream import TextStream, stop_strings
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

BUCKET = 64
"""Prompt and continuation lengths are rounded up to multiples of this, so that near lengths share a compilation."""
PIECE = 4
"""Tokens drawn between two looks at the text."""
_ENDS = 8  # numbers of ending ids are rounded up to multiples of this


def generate(
    model: LanguageModel,
    prompt: str | Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    cache_dtype: Any = None,
    stop: str | Sequence[str] = (),
) -> str | list[str]:
    """The model's continuation of a prompt, or of each of a list of prompts at once.

    A prompt stands where a document begins, after the token that documents begin with, if there is one; an empty prompt
    asks for a document from its beginning (see slm.evaluation.borders). A continuation ends before the next end-of-text
    token, before the first stop string, or at `max_new_tokens`.

    Args:
      model: a language model.
      prompt: a text, or a list of texts of any lengths.
      max_new_tokens: most tokens to add.
      temperature: divides the logits; 0 always takes the likeliest token.
      top_k: draw among the k likeliest tokens only (and ties of the k-th); None: among all.
      top_p: draw among the likeliest tokens that together reach this probability; None: among all.
      min_p: draw among tokens at least this many times as likely as the likeliest; None: among all.
      seed: row r of a list draws from stream seed + r whatever stands beside it: any row can be had again alone.
      cache_dtype: of cached keys and values, such as jnp.bfloat16 to halve the cache; None: the compute dtype, float32.
      stop: texts that end a continuation and do not become part of it, such as "\n\n".

    Returns:
      The continuation without the prompt: str for a str, a list for a list.

    Raises:
      ConfigError: a setting is out of range, or learned positions do not reach so far.
      DataError: a prompt is not valid Unicode.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    stops, sampling = stop_strings(stop), make_sampling(temperature, top_k, top_p, min_p)
    if not prompts:
        return []
    decoding = Decoding(
        model.transformer,
        model.params,
        [prompt_ids(model, text) for text in prompts],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        ends=end_ids(model),
        vocab_size=model.tokenizer.vocab_size,
        cache_dtype=cache_dtype,
    )
    streams = [TextStream(model.tokenizer, stops) for _ in prompts]
    texts = [""] * len(prompts)
    while not decoding.finished:
        rows = decoding.advance(PIECE if stops else max_new_tokens)
        for r, ids in enumerate(rows):
            texts[r] += streams[r].push(ids)
        decoding.finish(np.array([stream.stopped for stream in streams]))
    texts = [text + stream.close() for text, stream in zip(texts, streams)]
    return texts[0] if isinstance(prompt, str) else texts


def stream(model: LanguageModel, prompt: str, **settings: Any) -> Iterator[str]:
    """`generate` for one prompt, as pieces of text while they are written; `settings` and errors are those of generate.

    The pieces, joined, are what `generate` returns; none is empty, none ends inside a UTF-8 character, and what may be
    the beginning of a stop string is held back until it is known. Errors are raised at the call, not later.
    """
    return stream_from(model, prompt_ids(model, prompt), end_ids(model), **settings)


def stream_from(
    model: LanguageModel,
    ids: np.ndarray,
    ends: Sequence[int],
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    cache_dtype: Any = None,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """`stream` from token ids (T,), with `ends` as the ids that end the text."""
    text = TextStream(model.tokenizer, stop_strings(stop))
    decoding = Decoding(
        model.transformer,
        model.params,
        [ids],
        max_new_tokens=max_new_tokens,
        sampling=make_sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        ends=ends,
        vocab_size=model.tokenizer.vocab_size,
        cache_dtype=cache_dtype,
    )

    def pieces() -> Iterator[str]:
        while not (decoding.finished or text.stopped):
            if piece := text.push(decoding.advance(PIECE)[0]):
                yield piece
        if piece := text.close():
            yield piece

    return pieces()


def generate_tokens(
    transformer: Transformer,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    end_of_text: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    cache_dtype: Any = None,
) -> list[np.ndarray]:
    """`generate` on token ids.

    Args:
      transformer, params: the model.
      prompts: at least one id each.
      max_new_tokens, sampling, seed, cache_dtype: see `generate`.
      end_of_text: id, or ids, that end a row; None: no row ends early.
      vocab_size: ids from here on are never drawn (rows of a padded embedding); None: all may be.

    Returns:
      For each prompt its new ids, int32, at most max_new_tokens, without end_of_text.

    Raises ConfigError if max_new_tokens is less than 1 or learned positions do not reach so far.
    """
    if not prompts:
        return []
    ends = () if end_of_text is None else np.atleast_1d(end_of_text)
    how = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed, "cache_dtype": cache_dtype}
    return Decoding(transformer, params, prompts, ends=ends, vocab_size=vocab_size, **how).advance(max_new_tokens)


class Decoding:
    """Prompts that are being continued, some tokens at a time. Arguments and errors: see `generate_tokens`."""

    def __init__(
        self,
        transformer: Transformer,
        params: Any,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        ends: Sequence[int] = (),
        vocab_size: int | None = None,
        cache_dtype: Any = None,
    ):
        _check_length(transformer, max(map(len, prompts)), max_new_tokens)
        B, T = len(prompts), _round_up(max(map(len, prompts)))
        prompt_BxT = np.zeros((B, T), np.int32)
        for row, ids in zip(prompt_BxT, prompts):
            row[: len(ids)] = ids
        seeds = (np.arange(B) + seed) % 2**32
        ends_E = np.full(-(-max(len(ends), 1) // _ENDS) * _ENDS, -1, np.int32)
        ends_E[: len(ends)] = ends
        self._transformer, self._params = transformer, params
        self._setting = (
            np.array([len(ids) for ids in prompts], np.int32),
            jax.vmap(jax.random.key)(seeds.astype(np.uint32)),
            # Strong types, so that 1 and 1.0 share a compilation.
            Sampling(*(np.asarray(x, t) for x, t in zip(sampling, (np.float32, np.int32, np.float32, np.float32)))),
            ends_E,
            np.int32(vocab_size or transformer.cfg.vocab_size),
        )
        self._limit, self._seen = max_new_tokens, 0
        self._state = _prefill(
            transformer, params, prompt_BxT, self._setting, capacity=_round_up(max_new_tokens), cache_dtype=cache_dtype
        )
        self.finished = False
        """Whether every row has ended."""

    def advance(self, count: int) -> list[np.ndarray]:
        """The next ids of each row, int32, at most `count`; none for rows that have ended."""
        until = np.int32(min(self._seen + count, self._limit))
        self._state = _decode(self._transformer, self._params, self._state, self._setting, until)
        step, _, done_B, new_BxN, _ = self._state
        step, done_B, new_BxN = jax.device_get((step, done_B, new_BxN))
        self._seen, past = int(step), self._seen
        self.finished = bool(done_B.all()) or self._seen >= self._limit
        return [row[row >= 0] for row in new_BxN[:, past : self._seen]]

    def finish(self, rows_B: np.ndarray) -> None:
        """Ends the rows where `rows_B` is True."""
        if rows_B.any() and not self.finished:
            step, token_B, done_B, new_BxN, cache = self._state
            done_B = np.asarray(done_B) | rows_B
            self._state = step, token_B, jnp.asarray(done_B), new_BxN, cache
            self.finished = bool(done_B.all())


@functools.partial(jax.jit, static_argnames=("transformer", "capacity", "cache_dtype"))
def _prefill(transformer, params, prompt_BxT, setting, *, capacity, cache_dtype):
    """The state of a decoding after its first token: (tokens drawn, the last (B,), done (B,), new ids (B, capacity), -1
    where a row has none, cache). Prompts are padded on the right."""
    lengths_B = setting[0]
    B, T = prompt_BxT.shape
    at = jnp.arange(T)
    cache = transformer.init_cache(B, T + capacity, cache_dtype)
    hidden_BxTxD, cache = transformer.hidden(
        params, prompt_BxT, positions=jnp.where(at < lengths_B[:, None], at, -1), cache=cache
    )
    last_BxD = jnp.take_along_axis(hidden_BxTxD, (lengths_B - 1)[:, None, None], 1)[:, 0]
    new_BxN = jnp.full((B, capacity), -1, jnp.int32)
    return jnp.int32(1), *_draw(transformer, params, setting, 0, last_BxD, jnp.zeros(B, bool), new_BxN), cache


@functools.partial(jax.jit, static_argnames="transformer", donate_argnames="state")
def _decode(transformer, params, state, setting, until):
    """The state when `until` tokens have been drawn, or all rows are done; until <= capacity."""
    lengths_B = setting[0]

    def unfinished(state):
        step, _, done_B, _, _ = state
        return (step < until) & ~done_B.all()

    def advance(state):
        step, token_B, done_B, new_BxN, cache = state
        positions = (lengths_B + step - 1)[:, None]
        hidden_Bx1xD, cache = transformer.hidden(params, token_B[:, None], positions=positions, cache=cache)
        return step + 1, *_draw(transformer, params, setting, step, hidden_Bx1xD[:, 0], done_B, new_BxN), cache

    return jax.lax.while_loop(unfinished, advance, state)


def _draw(transformer, params, setting, step, hidden_BxD, done_B, new_BxN):
    _, keys_B, sampling, ends_E, vocab_size = setting
    logits_BxV = transformer.logits(params, hidden_BxD)
    logits_BxV = jnp.where(jnp.arange(logits_BxV.shape[-1]) < vocab_size, logits_BxV, -jnp.inf)
    token_B = sample(jax.vmap(jax.random.fold_in, (0, None))(keys_B, step), logits_BxV, sampling)
    done_B |= (token_B[:, None] == ends_E).any(-1)
    return token_B, done_B, new_BxN.at[:, step].set(jnp.where(done_B, -1, token_B))


def _check_length(transformer: Transformer, prompt_length: int, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    cfg = transformer.cfg
    if cfg.position == "learned" and prompt_length + max_new_tokens > cfg.max_length:
        raise ConfigError(
            f"the prompt's {prompt_length} tokens and max_new_tokens = {max_new_tokens} exceed the {cfg.max_length} "
            f"learned positions of this model: {_way_out(cfg.max_length - prompt_length)}"
        )


def _way_out(room: int) -> str:
    return f"set max_new_tokens to at most {room}" if room > 0 else "shorten the prompt"


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
