"""One attention operation as a PyTorch user would get it on this machine, forward and backward. One worker.

Dense and windowed: torch's SDPA. Recurrences: the chunked PyTorch code of flash-linear-attention (fla/ops/*/naive.py,
which it runs where Triton cannot) and of transformers.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from turns import serve

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
torch.manual_seed(0)
B, T, H, K = (job[name] for name in ("batch", "length", "heads", "size"))


def naive(name: str):
    """fla/ops/NAME/naive.py, loaded alone: the package itself imports Triton."""
    (root,) = importlib.util.find_spec("fla").submodule_search_locations
    spec = importlib.util.spec_from_file_location("naive", Path(root) / "ops" / name / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heads_first(*arrays):
    return [x.transpose(1, 2) for x in arrays]


def softmax(q, k, v, **_):
    return F.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True)


def window(q, k, v, **_):
    at = torch.arange(T)
    keep = (at[:, None] >= at) & (at[:, None] - at < job["window"])
    return F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=keep)


def linear(q, k, v, **_):
    return naive("linear_attn").naive_chunk_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=True)


def decay(q, k, v, scalar, **_):
    return naive("simple_gla").naive_chunk_simple_gla(q, k, v, scalar)[0]


def delta(q, k, v, beta, **_):
    return naive("delta_rule").delta_rule_chunkwise(*heads_first(q, k, v, beta))[0]


def gated_delta(q, k, v, beta, scalar, **_):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(q, k, v, scalar, beta)[0]


def kda(q, k, v, beta, channel, **_):
    return naive("kda").naive_chunk_kda(q, k, v, channel, beta)[0]


def dplr(q, k, v, channel, a, b, **_):
    return naive("generalized_delta_rule/dplr").dplr_chunkwise(*heads_first(q, k, v, a, b, channel))[0]


normal = torch.randn
inputs = {
    "q": normal(B, T, H, K),
    "k": F.normalize(normal(B, T, H, K), dim=-1),
    "v": normal(B, T, H, K),
    "beta": torch.sigmoid(normal(B, T, H)),
    "scalar": F.logsigmoid(normal(B, T, H)) / 16,
    "channel": F.logsigmoid(normal(B, T, H, K)) / 16,
}
inputs["a"] = -F.normalize(normal(B, T, H, K), dim=-1)
inputs["b"] = -inputs["a"] * torch.sigmoid(normal(B, T, H, K))
inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
operation = globals()[job["operation"]]


def turn():
    for x in inputs.values():
        x.grad = None
    out = operation(**inputs)
    out.float().square().sum().backward()


turn()
serve({"version": f"torch {torch.__version__}"}, turn)
