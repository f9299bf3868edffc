"""The small linen modules that blocks are made of."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm.config import ModelConfig
from slm.models.float8 import Float8Kernel, float8_product
from slm.models.quantized import QuantizedMatrix
from slm.models.quantized_products import RoundedInputs, quantized_product


def dense(
    features: int, name: str, cfg: ModelConfig, dtype: Any, std: float | None = None, part: str = "qkv"
) -> "Dense":
    """A projection x (..., in) -> (..., features) with kernel (in, features), normal(std or cfg.init_std).

    It has a bias if `part` is in cfg.bias.
    """
    init = nn.initializers.normal(cfg.init_std if std is None else std)
    return Dense(features, dtype, init, part in cfg.bias, name=name)


class Dense(nn.Module):
    """x kernel + bias, in `dtype`. The kernel may be a QuantizedMatrix or, in training, a Float8Kernel, whose product
    is in float8 unless `dtype` is float32: such layers were made to be exact."""

    features: int
    dtype: Any
    kernel_init: Callable
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        kernel = self.get_variable("params", "kernel")
        # Of whose parts flax would check the shapes.
        if not isinstance(kernel, (QuantizedMatrix, RoundedInputs, Float8Kernel)):
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        if isinstance(kernel, RoundedInputs):
            x, kernel = kernel.inputs(x), kernel.kernel
        if isinstance(kernel, QuantizedMatrix):
            y = _on_rows(quantized_product, x, kernel)
        elif isinstance(kernel, Float8Kernel) and self.dtype != jnp.float32:
            y = _on_rows(float8_product, x, kernel.astype(self.dtype))
        elif jax.default_backend() == "cpu":
            y = _on_rows(_product, x, kernel.astype(self.dtype))
        else:
            y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


def _on_rows(product, x, kernel):
    """product of x (..., in), as a matrix (N, in), and a kernel."""
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _product(x, kernel):
    """x (N, in) times kernel (in, out), with operands materialised in the backward pass.

    XLA:CPU transposes x for the kernel's gradient, and fuses whatever made x (an activation, a norm) into that strided
    copy, which then costs more than the product itself: about a sixth of a training step (benchmarks/README.md).
    """
    return x @ kernel


def _product_backward(operands, d_out):
    x, kernel = operands
    x, d_out = jax.lax.optimization_barrier((x, d_out))
    return d_out @ kernel.T, jax.lax.dot_general(x, d_out, (((0,), (0,)), ((), ())))


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


@jax.custom_vjp
def lookup(table, indices):
    """Rows of table (V, D) at integer indices (...): (..., D), with the table's gradient summed in float32.

    A frequent token's row gets thousands of contributions; summed in bfloat16 most of them would be rounded away (the
    sum of 4096 ones is 256).
    """
    return table[indices]


def _lookup_backward(residuals, d_rows):
    table, indices = residuals
    total = jnp.zeros(table.shape, jnp.float32).at[indices].add(d_rows.astype(jnp.float32))
    return total.astype(table.dtype), None


lookup.defvjp(lambda table, indices: (table[indices], (table, indices)), _lookup_backward)


def norm(name: str, cfg: ModelConfig, dtype: Any) -> nn.Module:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016); statistics in float32."""
    if cfg.norm == "layernorm":
        return nn.LayerNorm(epsilon=cfg.norm_eps, use_bias="norm" in cfg.bias, dtype=dtype, name=name)
    if cfg.norm == "affine":
        return Affine(dtype, name=name)
    return rms_norm(name, cfg, dtype)


class Affine(nn.Module):
    """x * scale + bias: what MobileBERT has in place of norms."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(self.dtype)
        return x * scale + self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(self.dtype)


def rms_norm(name: str, cfg: ModelConfig, dtype: Any) -> nn.Module:
    """RMSNorm whose scale is learned from 1, or as an offset from 1 if cfg.norm is zero-centred."""
    if cfg.norm == "zero_centered_rmsnorm":
        return ZeroCenteredRMSNorm(cfg.norm_eps, dtype, name=name)
    return nn.RMSNorm(epsilon=cfg.norm_eps, dtype=dtype, name=name)


class ZeroCenteredRMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), all in float32, as Gemma has it."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (normed * (1 + scale)).astype(self.dtype)


def residual_std(cfg: ModelConfig) -> float:
    """Scale of projections into the residual stream, so that its variance does not grow with depth (GPT-2)."""
    return cfg.init_std / (2 * cfg.layers) ** 0.5


_exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "geglu_erf": _exact_gelu,
    "gelu": jax.nn.gelu,
    "gelu_erf": _exact_gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
}
GATED = ("swiglu", "geglu", "geglu_erf")


def mlp_width(cfg: ModelConfig) -> int:
    """F: cfg.mlp_width, or 8/3 D (gated) or 4 D (plain), rounded up to a multiple of 32."""
    if cfg.mlp_width is not None:
        return cfg.mlp_width
    wanted = 8 * cfg.width / 3 if cfg.mlp in GATED else 4 * cfg.width
    return -int(-wanted // 32) * 32


class MLP(nn.Module):
    """down(act(gate x) * up x) if gated (Shazeer 2020), else down(act(up x)). (B, T, D) -> (B, T, D)."""

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxD):
        cfg, F = self.cfg, mlp_width(self.cfg)
        activation = ACTIVATIONS[cfg.mlp]
        up = dense(F, "up", cfg, self.dtype, part="mlp")(x_BxTxD)
        if cfg.mlp in GATED:
            hidden = activation(dense(F, "gate", cfg, self.dtype, part="mlp")(x_BxTxD)) * up
        else:
            hidden = activation(up)
        return dense(cfg.width, "down", cfg, self.dtype, residual_std(cfg), "mlp")(hidden)
