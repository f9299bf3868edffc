"""Text from a model: prefill through the cache, then one jitted loop that draws a token and feeds it back."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.errors import ConfigError
from slm.evaluation.sampling import Sampling, make_sampling, sample
from slm.models.heads import check_next_token
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

BUCKET = 64
"""Prompt and continuation lengths are rounded up to multiples of this, so that near lengths share a compilation."""


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
) -> str | list[str]:
    """The model's continuation of a prompt, or of each of a list of prompts at once.

    A prompt stands where a document begins, after the end-of-text token, if the tokenizer has one; an empty prompt asks
    for a document from its beginning. A continuation ends before the next end-of-text token, or at `max_new_tokens`.

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

    Returns:
      The continuation without the prompt: str for a str, a list for a list.

    Raises:
      ConfigError: a setting is out of range, learned positions do not reach so far, or the model is no decoder.
      DataError: a prompt is not valid Unicode.
    """
    check_next_token(model.config.model)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    tokenizer = model.tokenizer
    start = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    ids = [np.array([*start, *tokenizer.encode(text)], np.int32) for text in prompts]
    if not all(map(len, ids)):
        raise ConfigError("the prompt is empty, and this tokenizer has no end-of-text token to begin with: give a text")
    rows = generate_tokens(
        model.transformer,
        model.params,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=make_sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        end_of_text=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
        cache_dtype=cache_dtype,
    )
    texts = [tokenizer.decode(row) for row in rows]
    return texts[0] if isinstance(prompt, str) else texts


def generate_tokens(
    transformer: Transformer,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    end_of_text: int | None = None,
    vocab_size: int | None = None,
    cache_dtype: Any = None,
) -> list[np.ndarray]:
    """`generate` on token ids.

    Args:
      transformer, params: the model.
      prompts: at least one id each.
      max_new_tokens, sampling, seed, cache_dtype: see `generate`.
      end_of_text: id that ends a row; None: no row ends early.
      vocab_size: ids from here on are never drawn (rows of a padded embedding); None: all may be.

    Returns:
      For each prompt its new ids, int32, at most max_new_tokens, without end_of_text.

    Raises ConfigError if max_new_tokens is less than 1 or learned positions do not reach so far.
    """
    check_next_token(transformer.cfg)
    if not prompts:
        return []
    _check_length(transformer, max(map(len, prompts)), max_new_tokens)
    B, T = len(prompts), _round_up(max(map(len, prompts)))
    prompt_BxT = np.zeros((B, T), np.int32)
    for row, ids in zip(prompt_BxT, prompts):
        row[: len(ids)] = ids
    seeds = (np.arange(B) + seed) % 2**32
    new_BxN = _decode(
        transformer,
        params,
        prompt_BxT,
        np.array([len(ids) for ids in prompts], np.int32),
        jax.vmap(jax.random.key)(seeds.astype(np.uint32)),
        # Strong types, so that 1 and 1.0 share a compilation.
        Sampling(*(np.asarray(x, t) for x, t in zip(sampling, (np.float32, np.int32, np.float32, np.float32)))),
        np.int32(max_new_tokens),
        np.int32(-1 if end_of_text is None else end_of_text),
        np.int32(vocab_size or transformer.cfg.vocab_size),
        capacity=_round_up(max_new_tokens),
        cache_dtype=cache_dtype,
    )
    return [row[row >= 0] for row in np.asarray(new_BxN)]


@functools.partial(jax.jit, static_argnames=("transformer", "capacity", "cache_dtype"))
def _decode(
    transformer, params, prompt_BxT, lengths_B, keys_B, sampling, limit, end, vocab_size, *, capacity, cache_dtype
):
    """(B, capacity) new ids, -1 where a row has none. Prompts are padded on the right; `limit` <= capacity."""
    B, T = prompt_BxT.shape
    at = jnp.arange(T)
    cache = transformer.init_cache(B, T + capacity, cache_dtype)
    hidden_BxTxD, cache = transformer.hidden(
        params, prompt_BxT, positions=jnp.where(at < lengths_B[:, None], at, -1), cache=cache
    )
    last_BxD = jnp.take_along_axis(hidden_BxTxD, (lengths_B - 1)[:, None, None], 1)[:, 0]

    def draw(step, hidden_BxD, done_B, new_BxN):
        logits_BxV = transformer.logits(params, hidden_BxD)
        logits_BxV = jnp.where(jnp.arange(logits_BxV.shape[-1]) < vocab_size, logits_BxV, -jnp.inf)
        token_B = sample(jax.vmap(jax.random.fold_in, (0, None))(keys_B, step), logits_BxV, sampling)
        done_B |= token_B == end
        return token_B, done_B, new_BxN.at[:, step].set(jnp.where(done_B, -1, token_B))

    def unfinished(carry):
        step, _, done_B, _, _ = carry
        return (step < limit) & ~done_B.all()

    def advance(carry):
        step, token_B, done_B, new_BxN, cache = carry
        positions = (lengths_B + step - 1)[:, None]
        hidden_Bx1xD, cache = transformer.hidden(params, token_B[:, None], positions=positions, cache=cache)
        return step + 1, *draw(step, hidden_Bx1xD[:, 0], done_B, new_BxN), cache

    first = draw(0, last_BxD, jnp.zeros(B, bool), jnp.full((B, capacity), -1, jnp.int32))
    return jax.lax.while_loop(unfinished, advance, (jnp.int32(1), *first, cache))[3]


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
