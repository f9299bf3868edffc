"""Training that starts from a published model: model.init_from."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm.config import HOW_IT_RUNS, DataConfig, Experiment, MixerConfig, ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.families import FAMILIES, family_of
from slm.interop.gguf_file import open_gguf
from slm.interop.pretrained import CONFIG, from_pretrained, local_folder, read_config
from slm.interop.tensors import read_json
from slm.models.language_model import Origin

FREE_OF_MIXERS = ("implementation", "chunk")
"""Fields of model.mixer that say how it runs, as HOW_IT_RUNS does of model."""
TOKENIZER = "tokenizer.json"
ORIGIN = "origin"
"""Folder of a run that keeps what the model brought along."""


def started_from(cfg: Experiment) -> Experiment:
    """`cfg` with the architecture of the model in cfg.model.init_from, and its tokenizer unless one is named.

    Raises ConfigError for a field of cfg.model that contradicts it, and what `slm.from_pretrained` raises.
    """
    if cfg.model.init_from is None:
        return cfg
    path = Path(cfg.model.init_from).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"no file {path}")
        hf, _, tokenizer, origin = open_gguf(path)
        return agreed(cfg, read_config(FAMILIES[origin.family], hf, path).model, _with_tokenizer(tokenizer, cfg))
    folder = local_folder(cfg.model.init_from)
    hf = read_json(folder / CONFIG)
    return agreed(cfg, read_config(family_of(hf), hf, folder).model, folder)


def _with_tokenizer(tokenizer: dict, cfg: Experiment) -> Path:
    """A folder in the cache with the tokenizer.json of a GGUF file: data.tokenizer names a file of its own."""
    from slm.data.cache import build_once, cache_folder, digest

    text = json.dumps(tokenizer)
    folder = cache_folder(cfg.data.cache) / f"tokenizer-{digest(text)}"
    return build_once(folder, lambda where: (where / TOKENIZER).write_text(text, encoding="utf-8"))


def agreed(cfg: Experiment, theirs: ModelConfig, folder: Path) -> Experiment:
    """`cfg` with the model `theirs`, but for what says how it runs, and with the tokenizer in `folder` unless it names
    one. Raises ConfigError for a field of cfg.model that says otherwise."""
    path = cfg.model.init_from
    mine, unset = cfg.model, ModelConfig()
    for field in dataclasses.fields(ModelConfig):
        if field.name not in (*HOW_IT_RUNS, "mixer"):
            _agree(f"model.{field.name}", *(getattr(m, field.name) for m in (mine, unset, theirs)), path)
    for field in dataclasses.fields(MixerConfig):
        if field.name not in FREE_OF_MIXERS:
            values = (getattr(m.mixer, field.name) for m in (mine, unset, theirs))
            _agree(f"model.mixer.{field.name}", *values, path)
    kept = {name: getattr(mine, name) for name in HOW_IT_RUNS}
    mixer = dataclasses.replace(theirs.mixer, **{name: getattr(mine.mixer, name) for name in FREE_OF_MIXERS})
    data = cfg.data
    if data.tokenizer == DataConfig().tokenizer:
        if not (folder / TOKENIZER).is_file():
            raise ConfigError(f"model.init_from = {path!r} has no {TOKENIZER}: name one in data.tokenizer")
        data = dataclasses.replace(data, tokenizer=str(folder / TOKENIZER))
    return dataclasses.replace(cfg, model=dataclasses.replace(theirs, mixer=mixer, **kept), data=data)


def _agree(name: str, mine: Any, unset: Any, theirs: Any, path: str) -> None:
    if mine not in (unset, theirs):
        raise ConfigError(f"{name} = {mine!r} contradicts model.init_from: {path} has {theirs!r}; leave it out")


def starting_parameters(cfg: Experiment, place: Callable[[str, np.ndarray], jax.Array]) -> tuple[Any, Origin]:
    """(float32 parameters of cfg.model.init_from, where `place` puts them; what the model brought along)."""
    model = from_pretrained(cfg.model.init_from, place=place)
    return model.params, model.origin


def keep_origin(origin: Origin, run_dir: Path) -> None:
    """Copies what the model brought along into the run folder, so that the trained model can go back whence it came."""
    folder = run_dir / ORIGIN
    folder.mkdir(exist_ok=True)
    for name in (*origin.files, *origin.texts):
        (folder / name).write_bytes(
            Path(origin.files[name]).read_bytes() if name in origin.files else origin.texts[name].encode()
        )
    record = {"family": origin.family, "dtype": origin.dtype, "config": origin.config}
    (folder / "origin.json").write_text(json.dumps(record, indent=2) + "\n")


def kept_origin(run_dir: Path) -> Origin | None:
    """What `keep_origin` kept; None for a model that began here. Raises CheckpointError if it is damaged."""
    folder = run_dir / ORIGIN
    if not (folder / "origin.json").is_file():
        return None
    record = read_json(folder / "origin.json")
    if record.get("family") not in FAMILIES or not isinstance(record.get("config"), dict):
        raise CheckpointError(f"{folder / 'origin.json'} is damaged: delete {folder} to go on without it")
    files = {path.name: str(path) for path in folder.iterdir() if path.name != "origin.json"}
    return Origin(record["family"], record["config"], record.get("dtype", "float32"), files)
