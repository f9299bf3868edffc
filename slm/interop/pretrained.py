"""Loading and saving Hugging Face folders: slm.from_pretrained and slm.save_pretrained."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.config import DataConfig, Experiment, ModelConfig, check, flatten, override
from slm.errors import CheckpointError, ConfigError
from slm.interop import sentences
from slm.interop.families import FAMILIES, family_of
from slm.interop.families.family import Family, Names
from slm.interop.families.heads import SETTINGS
from slm.interop.gguf_file import open_gguf
from slm.interop.parameters import Bound, Tensors, bind, check_tensors, read_parameters, tensors_of
from slm.interop.sameness import same_model
from slm.interop.tensors import TensorFolder, read_json, write_shards
from slm.models.language_model import LanguageModel, Origin

CONFIG, GENERATION = "config.json", "generation_config.json"
COMPANIONS = (
    GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", *sentences.FILES,
)  # fmt: skip
"""Files of a folder that travel with a model that is loaded from it and saved again."""
SHARD_BYTES = 5 * 10**9


def from_pretrained(
    path: str | Path,
    dtype: Any = jnp.float32,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> LanguageModel:
    """The model in a Hugging Face folder (config.json, safetensors, tokenizer.json) or a GGUF file.

    Weights are read one by one; no second copy of the model exists at any time. The head is that of the class in
    `architectures`; tensors of a head that this class does not have are left out. An encoder without a head gives
    embeddings: as a folder of sentence-transformers says, else means over the tokens, of length one.

    Args:
      path: the folder; or a GGUF file; or a name on the Hub, such as HuggingFaceTB/SmolLM2-135M, where there is a
        network.
      dtype: of the parameters, and of computation with them.
      place: (path of a parameter, array) -> jax.Array, such as slm.training.mesh's placement by sharding rules;
        None: the default device.

    Raises:
      CheckpointError: the folder, or a file in it, is missing, damaged or hostile, or weights and config disagree.
      ConfigError: the family, or one of its settings, is not supported.
    """
    from slm.data.tokenizers import Tokenizer

    if Path(path).suffix == ".gguf":
        return _from_gguf(Path(path).expanduser(), dtype, place)
    folder = local_folder(path)
    hf = read_json(folder / CONFIG)
    family = family_of(hf)
    if SETTINGS not in hf and (settings := sentences.sentence_settings(folder)):
        hf[SETTINGS] = settings
    with TensorFolder(folder) as tensors:
        cfg, params = _read(family, hf, folder, tensors, dtype, place)
        stored = str(tensors.dtype(tensors.names()[0]))
    files = {name: str(folder / name) for name in COMPANIONS if (folder / name).is_file()}
    tokenizer = Tokenizer.load(folder) if "tokenizer.json" in files else None
    return LanguageModel(params, cfg, tokenizer, dtype, Origin(family.model_type, hf, stored, files))


def _from_gguf(path: Path, dtype: Any, place) -> LanguageModel:
    from tokenizers import Tokenizer as Backend

    from slm.data.tokenizers import Tokenizer

    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    hf, tensors, tokens, origin = open_gguf(path)
    cfg, params = _read(FAMILIES[origin.family], hf, path, tensors, dtype, place)
    try:
        tokenizer = Tokenizer(Backend.from_str(json.dumps(tokens)))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the tokenizer of {path} cannot be used: {error}") from error
    return LanguageModel(params, cfg, tokenizer, dtype, origin)


def _read(family: Family, hf: dict, source: Path, tensors: Tensors, dtype: Any, place) -> tuple[Experiment, dict]:
    """(config, parameters), after all that can be wrong has been looked at."""
    cfg = read_config(family, hf, source)
    # Before anything is made for each layer: the config may ask for millions. Layers that share their tensors may be
    # more than these, but no published model has 200.
    if cfg.model.layers > max(len(tensors.names()), 200 if cfg.model.shared_layers else 0):
        raise CheckpointError(f"{source}: {cfg.model.layers} layers in {CONFIG}, {len(tensors.names())} tensors")
    names = bare(family.names, tensors.names())
    bound = renamed(bind(cfg.model, names), tensors.names())
    check_tensors(bound, tensors, names, cfg.model.tied)
    return cfg, read_parameters(cfg.model, bound, tensors, dtype, place or (lambda path, array: jnp.asarray(array)))


def read_config(family: Family, hf: dict, source: Path) -> Experiment:
    """An Experiment around the model of a config.json, which functions take that take a LanguageModel.

    Raises ConfigError, naming `source`, for settings that are missing, ill-typed, contradictory or not supported.
    """
    try:
        model = family.read(hf)
        longest = model.max_length or hf.get("max_position_embeddings") or 1024
        cfg = Experiment(name=source.name, model=model, data=DataConfig(sequence_length=min(longest, 1024)))
        return check(override(cfg, flatten(cfg)))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{source}: config.json cannot be used: {type(error).__name__}: {error}") from error


def bare(names: Names, found: list[str]) -> Names:
    """`names` without the family's first word, if the file was saved from the model without its head."""
    first = names.layers.split(".")[0] + "."
    if any(name.startswith(first) for name in found):
        return names
    outside = tuple(link._replace(theirs=link.theirs.removeprefix(first)) for link in names.outside)
    return dataclasses.replace(names, layers=names.layers.removeprefix(first), outside=outside)


def renamed(bound: list[Bound], found: list[str]) -> list[Bound]:
    """`bound` with the names that old files have for the parameters of LayerNorm."""

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    there = set(found)
    return [
        one._replace(theirs=old(one.theirs)) if one.theirs not in there and old(one.theirs) in there else one
        for one in bound
    ]


def save_pretrained(
    model: LanguageModel, folder: str | Path, dtype: Any = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes a folder that `transformers` and slm.from_pretrained load.

    A model that was loaded from such a folder keeps its settings, tokenizer and chat template; of others, the family is
    the first that can express it.

    Args:
      model: any model whose architecture a family has.
      folder: created if need be; weights in it are replaced.
      dtype: of the stored weights; None: as they were loaded, float32 for a model trained here.
      shard_bytes: most bytes in one file.

    Returns:
      The folder.

    Raises:
      ConfigError: no family can express the model.
      CheckpointError: the folder cannot be written.
    """
    family, hf = describe(model)
    stored = jnp.dtype(dtype or (model.origin.dtype if model.origin else jnp.float32))
    hf = {"architectures": [family.architecture], "model_type": family.model_type} | hf
    hf |= {"dtype" if "dtype" in hf else "torch_dtype": stored.name}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A model without a head is saved bare, as transformers does.
        names = bare(family.names, []) if model.config.model.head == "embedding" else family.names
        bound = bind(model.config.model, names)
        write_shards(folder, tensors_of(model.params, bound, stored), shard_bytes)
        (folder / CONFIG).write_text(json.dumps(hf, indent=2) + "\n")
        for name, source in (model.origin.files if model.origin else {}).items():
            if Path(source).resolve() != (folder / name).resolve():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source, folder / name)
        for name, text in (model.origin.texts if model.origin else {}).items():
            (folder / name).write_text(text)
        if model.tokenizer is not None and not (folder / "tokenizer.json").is_file():
            save_tokenizer(model, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def save_tokenizer(model: LanguageModel, folder: Path) -> None:
    """tokenizer.json and what transformers wants beside it."""
    model.tokenizer.save(folder)
    end = model.tokenizer.end_of_text_token
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def describe(model: LanguageModel) -> tuple[Family, dict]:
    """The family that writes a model, and its config.json. Raises ConfigError if none can express it."""
    cfg, origin = model.config.model, model.origin
    if origin is not None:
        family = FAMILIES[origin.family]
        if same_model(family.read(origin.config), cfg):
            return family, origin.config
        written = _written(family, cfg)
        if written is not None:
            kept = {
                k: v for k, v in origin.config.items() if k not in ("rope_parameters", "rope_scaling", "rope_theta")
            }
            if len(kept.get("id2label") or ()) == cfg.labels:  # names of labels are worth keeping
                written = {k: v for k, v in written.items() if k not in ("id2label", "label2id")}
            return family, kept | written
    for family in FAMILIES.values():
        written = _written(family, cfg)
        if written is not None:
            ids = {}
            if model.tokenizer is not None and model.tokenizer.end_of_text is not None:
                ids = {"bos_token_id": model.tokenizer.end_of_text, "eos_token_id": model.tokenizer.end_of_text}
            longest = cfg.max_length or model.config.data.sequence_length
            return family, {"max_position_embeddings": longest} | dict(family.defaults) | written | ids
    raise ConfigError(
        f"no Hugging Face family has this model's architecture ({' '.join(cfg.attention)}, {cfg.norm}, {cfg.mlp}, "
        f"position = {cfg.position}, head = {cfg.head}); families: {', '.join(FAMILIES)}"
    )


def _written(family: Family, cfg: ModelConfig) -> dict | None:
    """config.json of `cfg` if reading it back gives the same model."""
    try:
        hf = family.write(cfg)
        return hf if same_model(family.read(hf), cfg) else None
    except (ConfigError, TypeError, ValueError, ZeroDivisionError, StopIteration):
        return None


def local_folder(path: str | Path) -> Path:
    """`path` if it is a folder, else the Hub's files of that name, downloaded once.

    Raises CheckpointError if it is neither, saying what to do without a network.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"no folder {folder}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"no folder {folder}; to fetch models from the Hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except Exception as error:  # whatever the network may raise
        raise CheckpointError(
            f"no folder {folder}, and the Hub did not give {name} ({type(error).__name__}); offline: copy the model's "
            "folder to this machine and give its path"
        ) from error
