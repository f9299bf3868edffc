"""Where a model's texts begin and end: ids before a prompt, and ids that finish a text."""

import numpy as np

from slm.errors import CheckpointError, ConfigError
from slm.models.language_model import LanguageModel

GENERATION = "generation_config.json"


def prompt_ids(model: LanguageModel, text: str) -> np.ndarray:
    """int32 (T,), T >= 1: a prompt that stands where a document begins.

    A model trained here begins documents after the end-of-text token; one from elsewhere with what its tokenizer.json
    puts first, such as <bos>, which may be nothing.
    Raises ConfigError if there is no token at all; DataError for invalid Unicode.
    """
    tokenizer = need_tokenizer(model)
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    ids = np.array([*(end if model.origin is None else _prefix(tokenizer)), *tokenizer.encode(text)], np.int32)
    if not len(ids):
        ids = np.array(end, np.int32)
    if not len(ids):
        raise ConfigError("the prompt is empty, and this tokenizer has no end-of-text token to begin with: give a text")
    return ids


def end_ids(model: LanguageModel) -> tuple[int, ...]:
    """Ids that end a text: eos_token_id of generation_config.json (one or several), else of config.json, else the
    tokenizer's end of text. Raises CheckpointError if the file is damaged."""
    origin, fallback = model.origin, need_tokenizer(model).end_of_text
    if origin is not None:
        for found in (one.get("eos_token_id") for one in (origin.settings(GENERATION), origin.config)):
            if found is None:
                continue
            ids = found if isinstance(found, list) else [found]
            if not all(type(i) is int for i in ids):
                raise CheckpointError(f"{model.config.name}: eos_token_id = {found!r} must be an id or a list of ids")
            # A negative one is how some configs say that they have none.
            return tuple(i for i in dict.fromkeys(ids) if i >= 0)
    return () if fallback is None else (fallback,)


def need_tokenizer(model: LanguageModel):
    """The tokenizer. Raises ConfigError if the model was loaded without one."""
    if model.tokenizer is None:
        raise ConfigError(f"{model.config.name} has no tokenizer.json: put it into the model's folder")
    return model.tokenizer


def _prefix(tokenizer) -> list[int]:
    encoding = tokenizer.backend.encode("a")
    marks = [*encoding.special_tokens_mask, 0]
    return encoding.ids[: marks.index(0)]
