"""Families by the model_type of config.json. A new one is one file with a table, and its place in this list."""

import difflib

from slm.errors import ConfigError
from slm.interop.families import bert, gemma, gpt, llama, mobilebert, modernbert, openelm, phi, qwen, recurrent
from slm.interop.families.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for module in (llama, qwen, gemma, phi, gpt, recurrent, openelm, bert, modernbert, mobilebert)
    for family in module.FAMILIES
}
"""In order of preference for a model that several could express."""


def family_of(hf: dict) -> Family:
    """The family of a config.json. Raises ConfigError for one that is not here."""
    name = hf.get("model_type")
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(str(name), FAMILIES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"config.json: model_type = {name!r} is not supported{hint} (supported: {', '.join(FAMILIES)})")
