"""Sequences decoded together in fixed shapes: a cache of S rows of L tokens, filled in chunks, grown a token at a time.

Two programs are compiled, whatever comes: one chunk of a prompt into one row, and one token for all rows. Rows without
a sequence stand at position -1, which no mechanism writes to its cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import ConfigError
from slm.evaluation.decoding import next_tokens
from slm.evaluation.sampling import Sampling
from slm.models.language_model import LanguageModel


class Slots:
    """The device's side of serving; not for several threads at once.

    Raises ConfigError if a size is below 1, or learned positions do not reach `length`.
    """

    def __init__(self, model: LanguageModel, slots: int, length: int, chunk: int = 128, cache_dtype: Any = None):
        for name, size, least in (("slots", slots, 1), ("length", length, 2), ("chunk", chunk, 1)):
            if size < least:
                raise ConfigError(f"{name} = {size}: must be at least {least}")
        cfg = model.config.model
        if cfg.position == "learned" and length > cfg.max_length:
            raise ConfigError(f"length = {length}: this model has {cfg.max_length} learned positions, and no more fit")
        self.slots, self.length, self.chunk = slots, length, min(chunk, length)
        self._transformer, self._params = model.transformer, model.params
        self._vocab_size = np.int32(model.tokenizer.vocab_size)
        self._empty = self._transformer.init_cache(1, length, cache_dtype)
        # Copies: what the programs give back overwrites what they were given.
        self._cache = jax.tree.map(jnp.copy, self._transformer.init_cache(slots, length, cache_dtype))
        self._token_S = np.zeros(slots, np.int32)
        self._position_S = np.full(slots, -1, np.int32)
        self._drawn_S = np.zeros(slots, np.int32)
        self._seed_S = np.zeros(slots, np.uint32)
        self._sampling = Sampling(
            np.zeros(slots, np.float32),
            np.zeros(slots, np.int32),
            np.ones(slots, np.float32),
            np.zeros(slots, np.float32),
        )

    @property
    def live_S(self) -> np.ndarray:
        """(S,) bool: rows that `step` draws for."""
        return self._position_S >= 0

    def fill(self, slot: int, ids: np.ndarray, start: int, sampling: Sampling, seed: int) -> int | None:
        """Reads the next chunk of a prompt into a row; from `start` = 0 on the row forgets what it held.

        Args:
          slot: the row.
          ids: the whole prompt (T,).
          start: ids read so far.
          sampling, seed: of this row; the token n of a row is drawn from stream seed at n, as slm.generate draws it.

        Returns:
          The first new token when the prompt ends with this chunk, else None.
        """
        part = ids[start : start + self.chunk]
        tokens_1xC = np.zeros((1, self.chunk), np.int32)
        tokens_1xC[0, : len(part)] = part
        one = Sampling(*(np.asarray([x], a.dtype) for x, a in zip(sampling, self._sampling)))
        token, self._cache = _fill(
            self._transformer,
            self._params,
            self._cache,
            self._empty,
            np.int32(slot),
            tokens_1xC,
            np.int32(start),
            np.int32(len(part)),
            np.uint32(seed % 2**32),
            one,
            self._vocab_size,
        )
        if start + len(part) < len(ids):
            return None
        self._token_S[slot], self._position_S[slot], self._drawn_S[slot] = token, len(ids), 1
        self._seed_S[slot] = seed % 2**32
        for values, value in zip(self._sampling, sampling):
            values[slot] = value
        return int(token)

    def step(self) -> np.ndarray:
        """One more token for every live row: (S,) int32, of which only those of live rows mean something."""
        # Copies: on a CPU the program may still be reading its arguments when they are changed below.
        changing = (self._token_S, self._position_S, self._drawn_S, self._seed_S)
        token_S, self._cache = _step(
            self._transformer,
            self._params,
            self._cache,
            *(values.copy() for values in changing),
            Sampling(*(values.copy() for values in self._sampling)),
            self._vocab_size,
        )
        live_S, token_S = self.live_S, np.asarray(token_S)
        self._token_S = np.where(live_S, token_S, 0)
        self._position_S[live_S] += 1
        self._drawn_S[live_S] += 1
        return self._token_S

    def free(self, slot: int) -> None:
        """The row draws no more, and takes the greedy path, which costs least."""
        self._position_S[slot] = -1
        for values, value in zip(self._sampling, (0.0, 0, 1.0, 0.0)):
            values[slot] = value


@functools.partial(jax.jit, static_argnames="transformer", donate_argnames="cache")
def _fill(transformer, params, cache, empty, slot, tokens_1xC, start, count, seed, sampling, vocab_size):
    """(token drawn after the chunk (), cache with the chunk in row `slot`). Leaves of a cache are (layers, S, ...)."""
    row = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, slot, 1, 1), cache)
    row = jax.tree.map(lambda a, b: jnp.where(start == 0, a, b), empty, row)
    at = jnp.arange(tokens_1xC.shape[1])
    positions_1xC = jnp.where(at < count, start + at, -1)[None]
    hidden_1xCxD, row = transformer.hidden(params, tokens_1xC, positions=positions_1xC, cache=row)
    cache = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), slot, 1), cache, row)
    last_1xD = jax.lax.dynamic_index_in_dim(hidden_1xCxD, count - 1, 1, keepdims=False)
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return next_tokens(transformer, params, last_1xD, key[None], sampling, vocab_size)[0], cache


@functools.partial(jax.jit, static_argnames="transformer", donate_argnames="cache")
def _step(transformer, params, cache, token_S, position_S, drawn_S, seed_S, sampling, vocab_size):
    """(tokens (S,), cache): row s reads token_S[s] at position_S[s] and draws its token number drawn_S[s]."""
    hidden_Sx1xD, cache = transformer.hidden(params, token_S[:, None], positions=position_S[:, None], cache=cache)
    keys_S = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seed_S, drawn_S)
    return next_tokens(transformer, params, hidden_Sx1xD[:, 0], keys_S, sampling, vocab_size), cache
