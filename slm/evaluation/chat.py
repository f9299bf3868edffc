"""Conversations with a model that was tuned for them: its template, its end of a turn, its answers."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slm.errors import CheckpointError, ConfigError, DataError
from slm.evaluation.borders import end_ids, need_tokenizer
from slm.evaluation.generate import stream_from
from slm.evaluation.rendering import Renderer
from slm.models.language_model import LanguageModel

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|return|>")


def render(
    model: LanguageModel,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the text that the model was tuned on, equal to transformers' `apply_chat_template`.

    Args:
      model: with a chat template in the folder that it was loaded from.
      messages: dicts with `role` (system, user, assistant ...) and `content`, oldest first; plain data as JSON has it.
      add_generation_prompt: end with the beginning of the assistant's turn.
      variables: more of what the template knows, such as {"enable_thinking": False}, `tools` or `documents`.

    Raises:
      ConfigError: the model has no chat template.
      DataError: the template raises (Gemma's does for a system message), loops, or does what its sandbox forbids.
      CheckpointError: tokenizer_config.json is damaged.
    """
    template = chat_template(model)
    if template is None:
        raise ConfigError(
            f"{model.config.name} has no chat template ({SETTINGS} or {TEMPLATE} in its folder): it was not tuned for "
            "conversations; give it a prompt to continue instead"
        )
    if not all(isinstance(message, Mapping) for message in messages):
        raise DataError("messages must be dicts with role and content")
    known = {"tools": None, "documents": None} | special_tokens(model) | dict(variables or {})
    known |= {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
    return _renderer(template)(known)


def encode(model: LanguageModel, messages: Sequence[Mapping[str, Any]], **how: Any) -> np.ndarray:
    """int32 (T,): `render`, with markers such as <|im_start|> as their ids. Not safe while other threads encode.

    As in transformers, a marker that a message spells out becomes its id too: who must not be able to end the user's
    turn has to take them out of the content before.
    """
    return need_tokenizer(model).encode(render(model, messages, **how), markers=True)


def reply(model: LanguageModel, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Iterator[str]:
    """The assistant's next message, in pieces as it is written; `settings` are those of slm.stream.

    Raises what `render` and slm.stream raise, before the first piece.
    """
    return stream_from(model, encode(model, messages), reply_ends(model), **settings)


def reply_ends(model: LanguageModel) -> tuple[int, ...]:
    """Ids that end a message: those that end a text, and those that end the assistant's turn."""
    return tuple(dict.fromkeys([*end_ids(model), *turn_ends(model)]))


def chat_template(model: LanguageModel) -> str | None:
    """The text of the model's template, the one called default if it has several; None: it has none."""
    if model.origin and (template := model.origin.text(TEMPLATE)) is not None:
        return template
    found = _settings(model).get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default") or next(iter(named.values()), None)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(
            f"{SETTINGS} of {model.config.name}: chat_template must be a text, or a list of named ones"
        )
    return found


def special_tokens(model: LanguageModel) -> dict[str, str]:
    """What templates call bos_token, eos_token ...: those that tokenizer_config.json has, as texts."""
    stored = {name: _settings(model).get(name) for name in SPECIAL}
    texts = {name: one.get("content") if isinstance(one, dict) else one for name, one in stored.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def turn_ends(model: LanguageModel) -> tuple[int, ...]:
    """Ids that end the assistant's turn: the tokenizer's eos_token, and markers that the template itself writes."""
    template, vocabulary = chat_template(model) or "", model.tokenizer.backend.get_vocab()
    names = [special_tokens(model).get("eos_token"), *(name for name in _TURN_ENDS if name in template)]
    return tuple(vocabulary[name] for name in dict.fromkeys(names) if name in vocabulary)


def _settings(model: LanguageModel) -> dict:
    return model.origin.settings(SETTINGS) if model.origin else {}


@functools.lru_cache(maxsize=8)
def _renderer(template: str) -> Renderer:
    return Renderer(template)
