"""A rotated residual stream: the same model, without channels of large weights (QuaRot, Ashkboos et al. 2024,
2404.00456; computational invariance: SliceGPT, 2401.15024).

RMSNorm without its scale commutes with an orthogonal Q: so scales go into the matrices that read a norm, an untied head
takes the last one's, and then what writes to the stream is multiplied by Q, and what reads it by Q^T.
"""

import jax.numpy as jnp
import numpy as np

from slm.compress.folding import WRITERS, at, check_same, norms, put, replaced
from slm.errors import ConfigError
from slm.models.language_model import LanguageModel
from slm.models.transformer import GROUPS


def orthogonal(size: int, seed: int = 0) -> np.ndarray:
    """(size, size) float64: Hadamard for the powers of two in size, (x) a random rotation of the rest, random signs."""
    power = size & -size
    draw = np.random.default_rng(seed)
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rest, _ = np.linalg.qr(draw.standard_normal((size // power, size // power)))
    return draw.choice([-1.0, 1.0], size)[:, None] * np.kron(hadamard / power**0.5, rest)


def rotate(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """An equal model with a rotated residual stream and an untied head.

    Raises ConfigError for one whose stream is read otherwise than by RMSNorm and matrices.
    """
    cfg = model.config.model
    if cfg.norm not in ("rmsnorm", "zero_centered_rmsnorm"):
        raise ConfigError(f"quantize.method = rotate needs RMSNorm, and model.norm = {cfg.norm}: use awq or gptq")
    extra = "norm" in model.params["embed"] or "projection" in model.params["embed"]
    if cfg.residual not in ("pre", "parallel", "parallel_shared") or cfg.bottleneck or extra or not cfg.first_norm:
        raise ConfigError(
            f"quantize.method = rotate cannot turn this model's stream (model.residual = {cfg.residual}): use gptq"
        )
    Q = orthogonal(cfg.width, seed)
    neutral = 0.0 if cfg.norm == "zero_centered_rmsnorm" else 1.0
    params = dict(model.params)
    params["embed"] = {name: _times(leaf, Q) for name, leaf in params["embed"].items()}
    head = dict(params.get("head", {}))
    kernel = np.asarray(model.params["embed"]["embedding"]).T if cfg.tied else np.asarray(head["kernel"])
    last = np.asarray(params["final_norm"]["scale"], np.float64) + (1 - neutral)
    head["kernel"] = _like(Q.T @ (last[:, None] * kernel), model.params["embed"]["embedding"])
    params["head"], params["final_norm"] = head, {"scale": model.params["final_norm"]["scale"] * 0 + neutral}
    for group in GROUPS:
        if group in params:
            pattern, _ = model.transformer.groups[group]
            params[group] = {
                str(i): _layer(layer, params[group][str(i)], Q, neutral) for i, layer in enumerate(pattern)
            }
    after = replaced(model, params, tied=False)
    check_same("rotate", model, after, np.arange(32)[None] * 7 % cfg.vocab_size)
    return after


def _layer(layer, params, Q, neutral):
    """Stacked parameters of one layer of the pattern."""
    for source, readers in norms(layer, params):
        scale = np.asarray(at(params, source)["scale"], np.float64) + (1 - neutral)
        for path in readers:
            part = at(params, path)
            kernel = np.matmul(Q.T, scale[..., None] * np.asarray(part["kernel"], np.float64))
            params = put(params, path, part | {"kernel": _like(kernel, part["kernel"])})
        params = put(params, source, {"scale": at(params, source)["scale"] * 0 + neutral})
    for path in WRITERS:
        if path.split("/")[0] in params:
            params = put(params, path, {name: _times(leaf, Q) for name, leaf in at(params, path).items()})
    return params


def _times(leaf, Q):
    return _like(np.asarray(leaf, np.float64) @ Q, leaf)


def _like(array, leaf):
    return jnp.asarray(array, leaf.dtype)
