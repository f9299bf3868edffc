"""Token ids from a model: prefill through the cache, then a jitted loop that draws a token and feeds it back."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import ConfigError
from slm.evaluation.sampling import Sampling, sample
from slm.models.transformer import Transformer

BUCKET = 64
"""Prompt and continuation lengths are rounded up to multiples of this, so that near lengths share a compilation."""
_ENDS = 8  # numbers of ending ids are rounded up to multiples of this


class Decoding:
    """Prompts that are being continued, some tokens at a time.

    Arguments and errors: see slm.evaluation.generate.generate_tokens; `ends` are the ids that end a row.
    """

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
        check_length(transformer, max(map(len, prompts)), max_new_tokens)
        self._transformer, self._params = transformer, params
        prompt_BxT, self._setting = prepare(prompts, sampling, seed, ends, vocab_size or transformer.cfg.vocab_size)
        self._limit, self._seen = max_new_tokens, 0
        self._state = _prefill(
            transformer, params, prompt_BxT, self._setting, capacity=round_up(max_new_tokens), cache_dtype=cache_dtype
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


def prepare(
    prompts: Sequence[np.ndarray], sampling: Sampling, seed: int, ends: Sequence[int], vocab_size: int
) -> tuple[np.ndarray, tuple]:
    """Prompts (B, T), padded on the right, and what holds for the whole decoding: (lengths (B,), keys (B,), sampling,
    ending ids (E,), vocabulary size)."""
    B, T = len(prompts), round_up(max(map(len, prompts)))
    prompt_BxT = np.zeros((B, T), np.int32)
    for row, ids in zip(prompt_BxT, prompts):
        row[: len(ids)] = ids
    seeds = (np.arange(B) + seed) % 2**32
    ends_E = np.full(-(-max(len(ends), 1) // _ENDS) * _ENDS, -1, np.int32)
    ends_E[: len(ends)] = ends
    return prompt_BxT, (
        np.array([len(ids) for ids in prompts], np.int32),
        jax.vmap(jax.random.key)(seeds.astype(np.uint32)),
        # Strong types, so that 1 and 1.0 share a compilation.
        Sampling(*(np.asarray(x, t) for x, t in zip(sampling, (np.float32, np.int32, np.float32, np.float32)))),
        ends_E,
        np.int32(vocab_size),
    )


@functools.partial(jax.jit, static_argnames=("transformer", "capacity", "cache_dtype"))
def _prefill(transformer, params, prompt_BxT, setting, *, capacity, cache_dtype):
    """The state of a decoding after its first token: (tokens drawn, the last (B,), done (B,), new ids (B, capacity), -1
    where a row has none, cache)."""
    B = len(prompt_BxT)
    last_BxD, cache = read(transformer, params, prompt_BxT, setting[0], capacity, cache_dtype)
    new_BxN = jnp.full((B, capacity), -1, jnp.int32)
    return jnp.int32(1), *_draw(transformer, params, setting, 0, last_BxD, jnp.zeros(B, bool), new_BxN), cache


def read(transformer, params, prompt_BxT, lengths_B, capacity, cache_dtype):
    """(hidden states of the prompts' last tokens (B, D), a cache of the prompts with room for `capacity` more)."""
    B, T = prompt_BxT.shape
    at = jnp.arange(T)
    cache = transformer.init_cache(B, T + capacity, cache_dtype)
    hidden_BxTxD, cache = transformer.hidden(
        params, prompt_BxT, positions=jnp.where(at < lengths_B[:, None], at, -1), cache=cache
    )
    return jnp.take_along_axis(hidden_BxTxD, (lengths_B - 1)[:, None, None], 1)[:, 0], cache


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
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    token_B = next_tokens(transformer, params, hidden_BxD, keys_B, sampling, vocab_size)
    done_B |= is_end(token_B, ends_E)
    return token_B, done_B, new_BxN.at[:, step].set(jnp.where(done_B, -1, token_B))


def is_end(tokens, ends_E):
    """Whether each of tokens (...) is one of the ids (E,): bool (...)."""
    return (tokens[..., None] == ends_E).any(-1)


def next_tokens(transformer, params, hidden_BxD, keys_B, sampling, vocab_size):
    """(B,) int32 ids below `vocab_size`, drawn from the logits of hidden states."""
    return sample(keys_B, logits_below(transformer, params, hidden_BxD, vocab_size), sampling)


def logits_below(transformer, params, hidden, vocab_size):
    """Logits (..., V) of hidden states (..., D), -inf from id `vocab_size` on."""
    logits = transformer.logits(params, hidden)
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def check_length(transformer: Transformer, prompt_length: int, max_new_tokens: int) -> None:
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


def round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
