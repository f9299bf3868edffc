"""Speculative decoding: a small model proposes some tokens, the large one reads them all at once and judges.

Leviathan et al. 2023 (2211.17192, algorithm 1), Chen et al. 2023 (2302.01318): a token x that the draft drew from q is
kept with probability min(1, p(x) / q(x)); in place of the first that is not, one is drawn from max(p - q, 0), and after
none was refused, one more from p. What is written has exactly the distribution of the large model alone, after
temperature and filters, which hold for p and q alike; at temperature 0 it is the very same text, but for ties.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import ConfigError
from slm.evaluation.decoding import check_length, is_end, logits_below, next_tokens, prepare, read, round_up
from slm.evaluation.sampling import Sampling, drawn_from
from slm.models.transformer import Transformer


class Draft(NamedTuple):
    """The model that proposes."""

    transformer: Transformer
    params: Any
    tokens: int = 4
    """Proposed at a time."""


class _State(NamedTuple):
    drawn_B: jax.Array
    """Tokens that each row has so far."""
    token_B: jax.Array
    """The last of them, which is in no cache yet."""
    done_B: jax.Array
    new_BxN: jax.Array
    """-1 where a row has none."""
    cache: Any
    draft_cache: Any
    rounds: jax.Array
    """Judgements of all rows together."""
    kept: jax.Array
    """Proposals that were kept, of all rows together."""


class SpeculativeDecoding:
    """A Decoding (slm.evaluation.decoding) with a draft.

    Arguments and errors are those of Decoding, and ConfigError if draft.tokens is less than 1. Rows need not have
    equally many tokens between two calls of `advance`, which may give some more than were asked for. Layers whose cache
    cannot be rewound read what was kept a second time.
    """

    def __init__(
        self,
        transformer: Transformer,
        params: Any,
        prompts: Sequence[np.ndarray],
        draft: Draft,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        ends: Sequence[int] = (),
        vocab_size: int | None = None,
        cache_dtype: Any = None,
    ):
        if draft.tokens < 1:
            raise ConfigError(f"draft_tokens = {draft.tokens}: must be at least 1")
        for one in (transformer, draft.transformer):
            check_length(one, max(map(len, prompts)), max_new_tokens)
        self._models = (transformer, draft.transformer)
        self._params = (params, draft.params)
        known = min(one.cfg.vocab_size for one in self._models)
        prompt_BxT, self._setting = prepare(prompts, sampling, seed, ends, min(vocab_size or known, known))
        self._tokens, self._limit = draft.tokens, max_new_tokens
        self._seen_B = np.zeros(len(prompts), np.int64)
        # The last judgement may reach beyond the limit.
        capacity = round_up(max_new_tokens + draft.tokens + 1)
        self._state = _prefill(
            self._models, self._params, prompt_BxT, self._setting, capacity=capacity, cache_dtype=cache_dtype
        )
        self.finished = False
        """Whether every row has ended."""

    @property
    def kept_share(self) -> float:
        """Share of the proposals that the large model kept."""
        rounds, kept = jax.device_get((self._state.rounds, self._state.kept))
        return float(kept) / max(float(rounds) * self._tokens, 1)

    def advance(self, count: int) -> list[np.ndarray]:
        """The next ids of each row, int32: at least `count`, and at most draft.tokens more, unless a row ends."""
        until_B = np.minimum(self._seen_B + count, self._limit).astype(np.int32)
        self._state = _decode(self._models, self._params, self._state, self._setting, until_B, tokens=self._tokens)
        drawn_B, done_B, new_BxN = jax.device_get((self._state.drawn_B, self._state.done_B, self._state.new_BxN))
        now_B = np.minimum(drawn_B, self._limit)
        rows = [row[past:now] for row, past, now in zip(new_BxN, self._seen_B, now_B)]
        self._seen_B = now_B
        self.finished = bool((done_B | (drawn_B >= self._limit)).all())
        return [row[row >= 0] for row in rows]

    def finish(self, rows_B: np.ndarray) -> None:
        """Ends the rows where `rows_B` is True."""
        if rows_B.any() and not self.finished:
            done_B = np.asarray(self._state.done_B) | rows_B
            self._state = self._state._replace(done_B=jnp.asarray(done_B))
            self.finished = bool((done_B | (self._seen_B >= self._limit)).all())


@functools.partial(jax.jit, static_argnames=("models", "capacity", "cache_dtype"))
def _prefill(models, params, prompt_BxT, setting, *, capacity, cache_dtype):
    lengths_B, keys_B, sampling, ends_E, vocab_size = setting
    (last_BxD, cache), (_, draft_cache) = (
        read(model, its, prompt_BxT, lengths_B, capacity, cache_dtype) for model, its in zip(models, params)
    )
    token_B = next_tokens(models[0], params[0], last_BxD, _fold(keys_B, 0), sampling, vocab_size)
    done_B = is_end(token_B, ends_E)
    B = len(prompt_BxT)
    new_BxN = jnp.full((B, capacity), -1, jnp.int32).at[:, 0].set(jnp.where(done_B, -1, token_B))
    zero = jnp.int32(0)
    return _State(jnp.ones(B, jnp.int32), token_B, done_B, new_BxN, cache, draft_cache, zero, zero)


@functools.partial(jax.jit, static_argnames=("models", "tokens"), donate_argnames="state")
def _decode(models, params, state, setting, until_B, *, tokens):
    """The state when every row has `until_B` tokens or is done."""

    def unfinished(state):
        return (~state.done_B & (state.drawn_B < until_B)).any()

    def one_round(state):
        return _propose_and_judge(models, params, state, setting, until_B, tokens)

    return jax.lax.while_loop(unfinished, one_round, state)


def _propose_and_judge(models, params, state, setting, until_B, G):
    """G tokens proposed and judged in rows that are not done and have fewer than `until_B`; others stay as they are."""
    lengths_B, keys_B, sampling, ends_E, vocab_size = setting
    (model, draft), (its, draft_its) = models, params
    going_B = ~state.done_B & (state.drawn_B < until_B)
    first_B = lengths_B + state.drawn_B - 1  # position of token_B
    # A row's numbers depend on what it has drawn, not on the rows beside it.
    keys_Bx3 = jax.vmap(lambda key: jax.random.split(key, 3))(_fold(keys_B, state.drawn_B))
    draft_B, judge_B, last_B = (keys_Bx3[:, n] for n in range(3))

    def propose(carry, i):
        token_B, cache = carry
        hidden_Bx1xD, cache = draft.hidden(draft_its, token_B[:, None], positions=(first_B + i)[:, None], cache=cache)
        weights_BxV = drawn_from(logits_below(draft, draft_its, hidden_Bx1xD[:, 0], vocab_size), sampling)
        next_B = _categorical(_fold(draft_B, i), weights_BxV)
        return (next_B, cache), (next_B, jax.nn.softmax(weights_BxV))

    (final_B, draft_cache), (proposed_GxB, q_GxBxV) = jax.lax.scan(
        propose, (state.token_B, state.draft_cache), jnp.arange(G)
    )
    proposed_BxG = proposed_GxB.T
    tokens_BxF = jnp.concatenate([state.token_B[:, None], proposed_BxG], 1)  # F = G + 1
    at_BxF = first_B[:, None] + jnp.arange(G + 1)
    hidden_BxFxD, cache = model.hidden(its, tokens_BxF, positions=at_BxF, cache=state.cache)
    p_BxFxV = jax.nn.softmax(drawn_from(logits_below(model, its, hidden_BxFxD, vocab_size), sampling))
    q_BxGxV = _fit(jnp.moveaxis(q_GxBxV, 0, 1), p_BxFxV.shape[-1])

    p_BxG, q_BxG = (jnp.take_along_axis(a, proposed_BxG[..., None], 2)[..., 0] for a in (p_BxFxV[:, :G], q_BxGxV))
    u_BxG = jax.vmap(lambda key: jax.random.uniform(key, (G,)))(judge_B)
    kept_B = jnp.cumprod(u_BxG * q_BxG < p_BxG, 1).sum(1)  # up to the first that is refused
    at_kept = kept_B[:, None, None]
    p_BxV = jnp.take_along_axis(p_BxFxV, at_kept, 1)[:, 0]
    q_BxV = jnp.take_along_axis(jnp.pad(q_BxGxV, ((0, 0), (0, 1), (0, 0))), at_kept, 1)[:, 0]  # nothing refused: q = 0
    rest_BxV = jnp.maximum(p_BxV - q_BxV, 0)
    # Where p = q but for rounding nothing may be left.
    rest_BxV = jnp.where(rest_BxV.sum(-1, keepdims=True) > 0, rest_BxV, p_BxV)
    corrected_B = _categorical(last_B, jnp.log(rest_BxV))

    i = jnp.arange(G + 1)
    new_BxF = jnp.where(i < kept_B[:, None], jnp.pad(proposed_BxG, ((0, 0), (0, 1))), corrected_B[:, None])
    ended_BxF = jnp.cumsum(is_end(new_BxF, ends_E) & (i <= kept_B[:, None]), 1) > 0
    valid_BxF = (i <= kept_B[:, None]) & going_B[:, None]
    columns = jnp.where(valid_BxF, state.drawn_B[:, None] + i, state.new_BxN.shape[1])
    new_BxN = state.new_BxN.at[jnp.arange(len(kept_B))[:, None], columns].set(
        jnp.where(ended_BxF, -1, new_BxF), mode="drop"
    )

    read_BxF = jnp.where(valid_BxF, at_BxF, -1)
    if not model.rewinds:
        _, cache = model.hidden(its, tokens_BxF, positions=read_BxF, cache=state.cache)
    if draft.rewinds:
        # The last proposal is in the draft's cache too, for the case that it was kept.
        _, draft_cache = draft.hidden(draft_its, final_B[:, None], positions=at_BxF[:, -1:], cache=draft_cache)
    else:
        _, draft_cache = draft.hidden(draft_its, tokens_BxF, positions=read_BxF, cache=state.draft_cache)
    return _State(
        state.drawn_B + jnp.where(going_B, kept_B + 1, 0),
        jnp.where(going_B, corrected_B, state.token_B),
        state.done_B | (going_B & ended_BxF[:, -1]),
        new_BxN,
        cache,
        draft_cache,
        state.rounds + going_B.sum(),
        state.kept + jnp.where(going_B, kept_B, 0).sum(),
    )


def _fold(keys_B, data):
    return jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(data, keys_B.shape))


def _categorical(keys_B, logits_BxV):
    return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)


def _fit(q, V):
    """Probabilities (..., any) as (..., V): vocabularies may be padded to different sizes."""
    q = q[..., :V]
    return jnp.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, V - q.shape[-1])])
