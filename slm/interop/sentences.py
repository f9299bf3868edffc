"""How a folder of sentence-transformers says that a sequence becomes one vector: modules.json and 1_Pooling."""

import json
from pathlib import Path
from typing import Any

from slm.errors import CheckpointError, ConfigError
from slm.interop.tensors import read_json

MODULES, POOLING = "modules.json", "1_Pooling/config.json"
FILES = (MODULES, POOLING, "config_sentence_transformers.json", "sentence_bert_config.json")
"""What sentence-transformers wants beside the model."""
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


def sentence_settings(folder: Path) -> dict[str, Any]:
    """{"pooling": "mean" or "first", "unit_length": bool}, or {} for a folder of another kind.

    Raises:
      CheckpointError: a file is damaged or missing.
      ConfigError: its modules are not a transformer, mean or first-token pooling, and perhaps a norm.
    """
    if not (folder / MODULES).is_file():
        return {}
    try:
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in json.loads((folder / MODULES).read_text())]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{folder / MODULES} is damaged: {type(error).__name__}: {error}") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConfigError(
            f"{folder / MODULES}: {', '.join(kinds)} is not supported, only Transformer, Pooling, Normalize"
        )
    settings = read_json(folder / POOLING)
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise ConfigError(f"{folder / POOLING}: {', '.join(modes)} is not supported, only one of {', '.join(_MODES)}")
    return {"pooling": _MODES[modes[0]], "unit_length": kinds[-1] == "Normalize"}
