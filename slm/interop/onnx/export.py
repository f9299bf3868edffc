"""Models as ONNX: slm.save_onnx writes what ONNX Runtime and its like run, without this package.

A folder: `forward.onnx`; of a model that can generate `start.onnx` and `decode.onnx` too; `weights.safetensors`, whose
parts the graphs name as external data, so that they share one copy; `settings.json`. Shapes are fixed, computation is
in float32. The runner is `slm.interop.onnx.runner.Exported`.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.config import ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.onnx.convert import convert
from slm.interop.onnx.graph import IR_VERSION, OPSET, Graph, Parameters, Tensor, constant
from slm.models.language_model import LanguageModel, answers
from slm.models.mixers import MIXERS, layer_pattern
from slm.models.paths import flat
from slm.models.quantized import check_float_weights
from slm.models.transformer import Transformer

WEIGHTS, SETTINGS = "weights.safetensors", "settings.json"


def save_onnx(
    model: LanguageModel, folder: str | Path, batch: int = 1, length: int = 256, cache_dtype: Any = None
) -> Path:
    """Writes forward pass and decode step of fixed shapes.

    Args:
      model: a decoder or an encoder.
      folder: created if need be.
      batch: rows (B).
      length: tokens (T) of a forward pass, and of the text that the decode cache holds.
      cache_dtype: of cached keys and values, float32 or float16; None: float32.

    Returns:
      The folder. Of a decoder: forward: tokens (B, T) -> logits (B, T, V); start: nothing -> cache/...; decode: tokens
      (B,), positions (B,), cache/... -> logits (B, V), new_cache/.... Of others: forward: tokens (B, T), mask (B, T),
      1 for tokens and 0 for padding[, token_types (B, T)] -> answer, as slm.logits gives it. Integers are int32,
      positions count from 0, answers are float32. Initializers have the paths of parameters, with /i for layer i of
      those that are stacked. LongRoPE takes the factors of a call's last position: steps and
      forward pass differ where a text is longer than the trained length.

    Raises:
      ConfigError: the weights are 8-bit ones, the model computes something that is not converted, a size cannot be, or
        the package onnx is missing.
      CheckpointError: the folder cannot be written.
    """
    from safetensors.numpy import save_file

    check_float_weights(model.params)
    if not importlib.util.find_spec("onnx"):
        raise ConfigError("ONNX files are written with the package onnx: pip install onnx")
    if batch < 1 or length < 1:
        raise ConfigError("batch and length must be at least 1")
    if cache_dtype is not None and jnp.dtype(cache_dtype) not in (jnp.float32, jnp.float16):
        raise ConfigError(f"cache_dtype = {jnp.dtype(cache_dtype).name}: it must be float32 or float16")
    if model.config.model.position == "learned" and length > model.config.model.max_length:
        raise ConfigError(f"length = {length}: this model has {model.config.model.max_length} learned positions")
    transformer = Transformer(_plain(model.config.model), jnp.float32)
    weights = {name: np.asarray(leaf, np.float32, order="C") for name, leaf in flat(model.params).items()}
    folder = Path(folder)
    settings = {"batch": batch, "length": length, "vocab_size": model.config.model.vocab_size, "functions": {}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)
        parameters = Parameters(weights, folder / WEIGHTS)
        params = jax.tree.unflatten(jax.tree.structure(model.params), list(weights.values()))
        for name, (function, arguments) in _functions(transformer, batch, length, cache_dtype).items():
            proto, signature = _model(name, function, params, arguments, parameters, model.config.model)
            (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
            settings["functions"][name] = signature
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def _plain(cfg: ModelConfig) -> ModelConfig:
    """`cfg` as a loop over layers with no backend but XLA's own, whatever machine exports it."""
    has = any(MIXERS[name].defaults.implementation is not None for name in layer_pattern(cfg))
    mixer = dataclasses.replace(cfg.mixer, implementation="xla" if has else None)
    return dataclasses.replace(cfg, scan=False, remat="none", mixer=mixer)


def _functions(transformer: Transformer, batch: int, length: int, cache_dtype: Any) -> dict:
    """Name to (function of parameters and named arrays that gives named arrays, the arrays' shapes)."""
    cfg = transformer.cfg
    row, rows = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch,), (batch, length)))

    def forward(params, tokens):
        return {"logits": answers(transformer, params, tokens)}

    def answer(params, tokens, mask, token_types=None):
        return {"answer": answers(transformer, params, tokens, mask, token_types)}

    def start(params):
        return {"cache": transformer.init_cache(batch, length, cache_dtype)}

    def decode(params, tokens, positions, cache):
        hidden, cache = transformer.hidden(params, tokens[:, None], positions=positions[:, None], cache=cache)
        return {"logits": transformer.logits(params, hidden[:, 0]), "new_cache": cache}

    if cfg.head != "lm":
        types = {"token_types": rows} if cfg.token_types else {}
        return {"forward": (answer, {"tokens": rows, "mask": rows} | types)}
    cache = jax.eval_shape(lambda: transformer.init_cache(batch, length, cache_dtype))
    return {
        "forward": (forward, {"tokens": rows}),
        "start": (start, {}),
        "decode": (decode, {"tokens": row, "positions": row, "cache": cache}),
    }


def _model(name: str, function, params, arguments: dict, parameters: Parameters, cfg: ModelConfig):
    """(ModelProto, {"inputs": {name: [type, shape]}, "outputs": ...}) of one function."""
    from onnx import helper

    g = Graph(parameters)
    inputs = {path: Tensor(a.shape, a.dtype, a.shape, path) for path, a in flat(arguments).items()}
    results = []

    def traced(params, given):
        out = function(params, **given)
        results.append(list(flat(out)))
        return out

    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    closed = jax.make_jaxpr(traced)(abstract, arguments)
    leaves = [constant(a, parameter=True) for a in jax.tree.leaves(params)]
    outs = convert(g, closed.jaxpr, [constant(c) for c in closed.consts], [*leaves, *_in_order(arguments, inputs)])
    outputs = list(zip(results[0], outs))
    graph = g.proto(name, list(inputs.values()), outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    proto.producer_name, proto.producer_version = "slm", _version()
    about = {"slm.function": name, "slm.model": json.dumps(dataclasses.asdict(cfg))}
    helper.set_model_props(proto, about)
    named = {"inputs": inputs.items(), "outputs": outputs}
    return proto, {side: {path: [str(x.dtype), list(x.shape)] for path, x in values} for side, values in named.items()}


def _in_order(arguments, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[path] for path in flat(arguments)]


def _version() -> str:
    try:
        return importlib.metadata.version("slm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
