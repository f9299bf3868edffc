"""Text from a model, whole or as a stream.

Decoding runs to the end of the continuation where only tokens can end it, and a few tokens at a time where somebody
reads along: a stream, or stop strings, which are sought in decoded text.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from slm.errors import ConfigError
from slm.evaluation.borders import end_ids, need_tokenizer, prompt_ids
from slm.evaluation.decoding import Decoding
from slm.evaluation.sampling import Sampling, make_sampling
from slm.evaluation.speculative import Draft, SpeculativeDecoding
from slm.evaluation.text_stream import TextStream, stop_strings
from slm.models.heads import check_next_token
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

PIECE = 4
"""Tokens drawn between two looks at the text."""


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
    draft: LanguageModel | None = None,
    draft_tokens: int = 4,
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
      cache_dtype: of cached keys and values, such as jnp.bfloat16, which halves them, or jnp.int8, which halves them
        again; None: the compute dtype, float32.
      stop: texts that end a continuation and do not become part of it, such as "\n\n".
      draft: a smaller model with the same vocabulary that proposes tokens, for speed (slm.evaluation.speculative).
      draft_tokens: how many it proposes at a time.

    Returns:
      The continuation without the prompt: str for a str, a list for a list.

    Raises:
      ConfigError: a setting is out of range, learned positions do not reach so far, the model is no decoder, or the
        draft has another vocabulary.
      DataError: a prompt is not valid Unicode.
    """
    check_next_token(model.config.model)
    prompts, stops = [prompt] if isinstance(prompt, str) else list(prompt), stop_strings(stop)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    make_sampling(**filters)  # wrong settings are told even where there is no prompt
    if not prompts:
        return []
    rows = [prompt_ids(model, text) for text in prompts]
    proposals = {"draft": draft, "draft_tokens": draft_tokens}
    decoding = start(model, rows, end_ids(model), max_new_tokens, seed, cache_dtype, **filters, **proposals)
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
    model: LanguageModel, ids: np.ndarray, ends: Sequence[int], stop: str | Sequence[str] = (), **settings: Any
) -> Iterator[str]:
    """`stream` from token ids (T,), with `ends` as the ids that end the text."""
    text = TextStream(model.tokenizer, stop_strings(stop))
    decoding = start(model, [ids], ends, **settings)

    def pieces() -> Iterator[str]:
        while not (decoding.finished or text.stopped):
            if piece := text.push(decoding.advance(PIECE)[0]):
                yield piece
        if piece := text.close():
            yield piece

    return pieces()


def start(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    ends: Sequence[int],
    max_new_tokens: int = 128,
    seed: int = 0,
    cache_dtype: Any = None,
    draft: LanguageModel | None = None,
    draft_tokens: int = 4,
    **filters: Any,
) -> Decoding | SpeculativeDecoding:
    """The decoding of prompts of token ids, for text; `filters` are those of make_sampling, all else as in generate."""
    how = {
        "max_new_tokens": max_new_tokens,
        "sampling": make_sampling(**filters),
        "seed": seed,
        "ends": ends,
        "vocab_size": model.tokenizer.vocab_size,
        "cache_dtype": cache_dtype,
    }
    if draft is None:
        return Decoding(model.transformer, model.params, prompts, **how)
    check_draft(model, draft)
    proposer = Draft(draft.transformer, draft.params, draft_tokens)
    return SpeculativeDecoding(model.transformer, model.params, prompts, proposer, **how)


def check_draft(model: LanguageModel, draft: LanguageModel) -> None:
    """Raises ConfigError unless `draft` can propose tokens for `model`."""
    check_next_token(draft.config.model)
    if need_tokenizer(draft).backend.get_vocab() != need_tokenizer(model).backend.get_vocab():
        raise ConfigError(
            f"draft {draft.config.name} has another vocabulary than {model.config.name}: a draft proposes token ids, "
            "so take a smaller model of the same family"
        )


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
    check_next_token(transformer.cfg)
    if not prompts:
        return []
    ends = () if end_of_text is None else np.atleast_1d(end_of_text)
    how = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed, "cache_dtype": cache_dtype}
    return Decoding(transformer, params, prompts, ends=ends, vocab_size=vocab_size, **how).advance(max_new_tokens)
