"""A trained model as one value: parameters, the experiment that made them, and the tokenizer."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from slm.config import Experiment
from slm.errors import CheckpointError
from slm.models.transformer import Transformer, any_backend


@dataclass(frozen=True)
class Origin:
    """What a model from another house brought along, so that it can go back there."""

    family: str
    """A name in slm.interop.families.FAMILIES."""
    config: dict
    """Its config.json."""
    dtype: str
    """Of the stored weights."""
    files: dict[str, str]
    """Name to path of the other files that belong to it: tokenizer, chat template, generation settings."""
    texts: dict[str, str] = field(default_factory=dict)
    """Name to content of such files that exist nowhere yet."""

    def text(self, name: str) -> str | None:
        """Content of one of these files; None if there is none. Raises CheckpointError if it cannot be read."""
        if name not in self.files:
            return self.texts.get(name)
        try:
            return Path(self.files[name]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {self.files[name]}: {error}") from error

    def settings(self, name: str) -> dict:
        """The JSON object in one of these files; empty if there is none. Raises CheckpointError if it is damaged."""
        where = self.files.get(name, name)
        try:
            found = json.loads(self.text(name) or "{}")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{where} holds no JSON object")
        return found


@dataclass(frozen=True)
class LanguageModel:
    """What `slm.load` returns and `slm.logits`, `slm.generate`, `slm.evaluate` take."""

    params: Any
    """Parameter tree of `Transformer.init`, of dtype `dtype`."""
    config: Experiment
    """With model.vocab_size and model.max_length filled in."""
    tokenizer: Any
    """slm.data.tokenizers.Tokenizer."""
    dtype: Any = jnp.float32
    """Of computation."""
    origin: Origin | None = None
    """None: trained here."""

    @property
    def transformer(self) -> Transformer:
        # Not every backend that trained in half precision can serve this dtype.
        return Transformer(any_backend(self.config.model), self.dtype)

    def __repr__(self) -> str:
        from slm.models.counts import parameter_counts

        m = self.config.model
        return (
            f"LanguageModel({self.config.name}: {parameter_counts(m)['total']:,} parameters, {m.layers} layers of "
            f"{'/'.join(m.attention)}, width {m.width}, vocabulary {m.vocab_size})"
        )


def logits(model: LanguageModel, tokens, attention_mask=None, token_type_ids=None):
    """What a model answers: by its head, logits over the vocabulary, labels, or embeddings.

    Args:
      model: a decoder or an encoder.
      tokens: (B, T) integers.
      attention_mask: (B, T), 1 for tokens and 0 for padding, which no token sees; positions count tokens only. The
        tokens of a row follow each other: padding stands before or after them.
      token_type_ids: (B, T), such as 0 for the first sentence and 1 for the second; None: 0.

    Returns:
      float32: (B, T, vocab) of the next token, or of the token itself for model.head = masked_lm; (B, labels) for
      sequence, (B, T, labels) for token, (B, D) for embedding. What stands at padding means nothing.

    Raises:
      ValueError: token types for a model that has none, or more tokens than learned positions.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    m = model.config.model
    if token_type_ids is not None:
        if not m.token_types:
            raise ValueError("token_type_ids: this model has no token types (model.token_types = 0)")
        token_type_ids = jnp.asarray(token_type_ids, jnp.int32)
    if m.position == "learned" and tokens.shape[1] > m.max_length:
        raise ValueError(f"{tokens.shape[1]} tokens exceed the {m.max_length} learned positions of this model")
    return answers(model.transformer, model.params, tokens, attention_mask, token_type_ids)


def answers(transformer: Transformer, params, tokens, attention_mask=None, token_type_ids=None):
    """`logits` as a pure function of parameters and arrays, for whoever traces it."""
    segment_ids = positions = None
    if attention_mask is not None:
        segment_ids = jnp.asarray(attention_mask, jnp.int32)
        positions = jnp.maximum(jnp.cumsum(segment_ids, 1) - 1, 0)
    hidden, _ = transformer.hidden(
        params, tokens, segment_ids=segment_ids, positions=positions, token_types=token_type_ids
    )
    return transformer.answer(params, hidden, segment_ids)
