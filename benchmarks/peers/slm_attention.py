"""One attention operation of slm, forward and backward. One worker; the same inputs' sizes as torch_attention.py."""

import json
import sys

import jax
import jax.numpy as jnp
from turns import serve

from slm import attention
from slm.training.step import compiler_options

job = json.loads(sys.argv[1])
B, T, H, K = (job[name] for name in ("batch", "length", "heads", "size"))
OPERATIONS = {
    "softmax": lambda x: attention.softmax_attention(x["q"], x["k"], x["v"]),
    "window": lambda x: attention.softmax_attention(x["q"], x["k"], x["v"], window=job["window"]),
    "linear": lambda x: attention.linear_attention(x["q"], x["k"], x["v"]),
    "decay": lambda x: attention.decay_attention(x["q"], x["k"], x["v"], x["scalar"])[0],
    "delta": lambda x: attention.delta_attention(x["q"], x["k"], x["v"], x["beta"])[0],
    "gated_delta": lambda x: attention.delta_attention(x["q"], x["k"], x["v"], x["beta"], log_decay=x["scalar"])[0],
    "kda": lambda x: attention.delta_attention(x["q"], x["k"], x["v"], x["beta"], log_decay=x["channel"])[0],
    "dplr": lambda x: attention.dplr_attention(x["q"], x["k"], x["v"], x["channel"], x["a"], x["b"])[0],
}  # fmt: skip
keys = iter(jax.random.split(jax.random.key(0), 9))


def normal(*shape):
    return jax.random.normal(next(keys), shape)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


inputs = {
    "q": normal(B, T, H, K),
    "k": unit(normal(B, T, H, K)),
    "v": normal(B, T, H, K),
    "beta": jax.nn.sigmoid(normal(B, T, H)),
    "scalar": jax.nn.log_sigmoid(normal(B, T, H)) / 16,
    "channel": jax.nn.log_sigmoid(normal(B, T, H, K)) / 16,
    "a": -unit(normal(B, T, H, K)),
}
inputs["b"] = -inputs["a"] * jax.nn.sigmoid(normal(B, T, H, K))
operation = OPERATIONS[job["operation"]]
gradient = jax.grad(lambda x: jnp.square(operation(x).astype(jnp.float32)).sum())
program = jax.jit(gradient, compiler_options=compiler_options(jax.default_backend())).lower(inputs).compile()


def turn():
    jax.block_until_ready(program(inputs))


turn()
serve({"version": f"jax {jax.__version__}"}, turn)
