"""What encoders of all families share: heads by the class in `architectures`, and their fields of config.json."""

from typing import Any

from slm.config import ModelConfig
from slm.errors import ConfigError

CLASSES = {
    "masked_lm": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "embedding": "Model",
}
"""Head to the ending of its classes. The first of a config's `architectures` decides; without any it is `embedding`."""
PRETRAINING = "ForPreTraining"
"""A masked LM with a second head, which is left out."""
SETTINGS = "slm_embedding"
"""Field of config.json, ours, that says how a sequence becomes a vector: {"pooling": "mean", "first" or "pooler",
"unit_length": true or false}. slm.interop.pretrained makes it from the files of sentence-transformers."""
DEFAULT = {"pooling": "mean", "unit_length": True}


def read_head(hf: dict, prefix: str, pooler: str = "none") -> dict[str, Any]:
    """Fields of ModelConfig that say what the model answers.

    Args:
      hf: config.json.
      prefix: what the family's classes begin with, such as Bert.
      pooler: activation of the dense layer that reads the first token, if the family has one.

    Raises:
      ConfigError: the class is none of the four kinds.
    """
    named = (hf.get("architectures") or [prefix + "Model"])[0]
    endings = CLASSES | {"masked_lm": (CLASSES["masked_lm"], PRETRAINING)}
    heads = [head for head, ending in endings.items() if str(named).removeprefix(prefix) in _several(ending)]
    if not heads:
        known = ", ".join(prefix + ending for ending in CLASSES.values())
        raise ConfigError(f"config.json: architectures = [{named!r}] is not supported, only {known}")
    if heads == ["embedding"]:
        return {"head": "embedding"} | _read_embedding(hf, pooler)
    if heads == ["masked_lm"]:
        return {"head": "masked_lm"}
    names = hf.get("id2label")
    labels = {"head": heads[0], "labels": len(names) if names else hf.get("num_labels") or 2}
    return labels | ({"head_activation": pooler} if heads == ["sequence"] else {})


def _several(ending: str | tuple[str, ...]) -> tuple[str, ...]:
    return ending if isinstance(ending, tuple) else (ending,)


def _read_embedding(hf: dict, pooler: str) -> dict[str, Any]:
    settings = DEFAULT | (hf.get(SETTINGS) or {})
    pooling = settings["pooling"]
    if pooling not in ("mean", "first", "pooler") or (pooling == "pooler" and pooler == "none"):
        raise ConfigError(f"config.json: {SETTINGS}.pooling = {pooling!r} is not supported for this model")
    return {
        "pooling": "mean" if pooling == "mean" else "first",
        "head_activation": pooler if pooling == "pooler" else "none",
        "unit_length": bool(settings["unit_length"]),
    }


def write_head(cfg: ModelConfig, prefix: str) -> dict[str, Any]:
    """Inverse of `read_head`. Raises ConfigError for a decoder."""
    if cfg.head not in CLASSES:
        raise ConfigError(f"model.head = {cfg.head}: {prefix} has none such")
    hf: dict[str, Any] = {"architectures": [prefix + CLASSES[cfg.head]]}
    if cfg.labels:
        names = {str(i): f"LABEL_{i}" for i in range(cfg.labels)}
        hf |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    if cfg.head == "embedding":
        pooling = "pooler" if cfg.head_activation != "none" else cfg.pooling
        hf[SETTINGS] = {"pooling": pooling, "unit_length": cfg.unit_length}
    return hf
