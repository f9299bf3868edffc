"""What a run begins with: the model in model.init_from, made smaller or other as the experiment asks.

In this order: shrunken (cfg.shrink), with other mixers (cfg.convert), pruned (cfg.prune, by criteria that measure). The
sizes are known before any weight is read, so that a run is planned, and resumed, without doing it again.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm.compress.convert import converted_config, converted_params
from slm.compress.prune import BY_LAYERS, starting_prune
from slm.compress.shrink import shipped_config, shrink_to, shrunk_config
from slm.config import Experiment, MixerConfig, from_json
from slm.errors import CheckpointError, ConfigError
from slm.interop.starting import agreed, started_from, starting_parameters
from slm.models.language_model import LanguageModel, Origin
from slm.models.paths import flat
from slm.models.quantized import dequantized
from slm.models.transformer import Transformer
from slm.training.transforms import replaced

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def starting_config(cfg: Experiment) -> Experiment:
    """`cfg` with the architecture that it starts from, as it will be. Raises ConfigError, CheckpointError."""
    if cfg.model.init_from is None:
        if cfg.prune.on and cfg.prune.criterion in BY_LAYERS:
            raise ConfigError(
                f"prune.criterion = {cfg.prune.criterion} measures a trained model: set model.init_from, or take "
                "another"
            )
        return cfg
    mixer = cfg.model.mixer
    if cfg.convert.on:
        # Switches are those of the new layers.
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, mixer=MixerConfig()))
    try:
        cfg = _from_run(cfg) if _is_ours(cfg.model.init_from) else started_from(cfg)
    except CheckpointError as error:
        raise CheckpointError(f"model.init_from = {cfg.model.init_from!r}: {error}") from error
    model = shrunk_config(cfg.model, cfg.shrink) if _cuts(cfg) else cfg.model
    if cfg.convert.on:
        chosen = {field.name: getattr(mixer, field.name) for field in dataclasses.fields(MixerConfig)}
        switches = {name: value for name, value in chosen.items() if value is not None}
        model = converted_config(model, cfg.convert.attention, switches)
    return dataclasses.replace(cfg, model=model)


def starting_params(
    cfg: Experiment, place: Callable[[str, np.ndarray], jax.Array], data: Any
) -> tuple[Any, Origin | None]:
    """(float32 parameters to start from, where `place` puts them by name; what the model brought along).

    Args:
      cfg: what `starting_config` gave.
      data: slm.data.pipeline.Data, of whose training sequences some are measured.

    Raises what opening a model, and each of the changes, raises.
    """
    path, measures = cfg.model.init_from, cfg.prune.on and cfg.prune.criterion in BY_LAYERS
    if not (_is_ours(path) or _cuts(cfg) or cfg.convert.on or measures):
        return starting_parameters(cfg, place)
    from slm.evaluation.opening import open_model

    model = open_model(path)
    model = dataclasses.replace(model, params=dequantized(model.params))
    origin = model.origin
    if _cuts(cfg):
        model = shrink_to(model, cfg.shrink, sequences(data, cfg.shrink.calibration), cfg.seed)
    if cfg.convert.on:
        becomes = Transformer(cfg.model)
        params = converted_params(model.transformer, model.params, becomes, cfg.seed)
        model = LanguageModel(params, dataclasses.replace(model.config, model=cfg.model), model.tokenizer)
        origin = None
    if measures:
        params = starting_prune(cfg, model, sequences(data, cfg.prune.calibration))
        model = dataclasses.replace(model, params=params)
    leaves = {name: place(name, np.asarray(leaf, np.float32)) for name, leaf in flat(model.params).items()}
    return replaced(model.params, leaves), origin


def sequences(data: Any, count: int) -> np.ndarray:
    """(count, T) ids of training sequences: the first that the run will see, or fewer if there are no more."""
    return data.train_batch(0, min(count, data.train_sequences))["tokens"]


def _cuts(cfg: Experiment) -> bool:
    """Whether the model is made smaller before the first step."""
    return cfg.shrink.on and not cfg.shrink.learned


def _is_ours(path: str) -> bool:
    """Whether it is a run of ours, or a model that slm.save wrote: their config.json has a section `model`."""
    try:
        return isinstance(_stored(path), Experiment)
    except (OSError, ConfigError):
        return False


def _stored(path: str) -> Experiment:
    return from_json((Path(path).expanduser() / CONFIG).read_text(encoding="utf-8"))


def _from_run(cfg: Experiment) -> Experiment:
    folder = Path(cfg.model.init_from).expanduser()
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(f"{str(folder)!r} has no {TOKENIZER}: copy it back")
    return agreed(cfg, shipped_config(_stored(cfg.model.init_from)).model, folder)
