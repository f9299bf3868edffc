"""Writes tests/oracle/openelm.npz and .json. transformers has no OpenELM, so the reference is written out in torch.

After the paper (Mehta et al. 2024, 2404.14619) and the published model's code: layers with heads and widths of their
own, one projection for queries, keys and values (all query heads, then key heads, then value heads), RMS norms of
queries and keys before half-split rotary positions, one projection for the gate and what it gates, a tied head.

    python tests/oracle/make_openelm.py        (needs torch)
"""

import json
import math

import numpy as np
import torch
from weights import ORACLE, weights_of

V, D, K = 96, 32, 8
HEADS, KV_HEADS, SHARES, DIVISOR = [4, 6, 6, 8], [2, 3, 3, 4], [0.5, 1.67, 2.83, 4.0], 16


def width(share):
    size = share * D
    nearest = max(DIVISOR, int(size + DIVISOR / 2) // DIVISOR * DIVISOR)
    return nearest + DIVISOR if nearest < 0.9 * size else nearest


def rms(x, weight):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def turn(x):
    """x (B, H, T, K)."""
    frequencies = 10000.0 ** (-torch.arange(0, K, 2).float() / K)
    angles = torch.outer(torch.arange(x.shape[2]).float(), frequencies).repeat(1, 2)
    half = torch.cat([-x[..., K // 2 :], x[..., : K // 2]], -1)
    return x * angles.cos() + half * angles.sin()


def forward(w, tokens):
    x = w["transformer.token_embeddings.weight"][tokens]
    B, T = tokens.shape
    future = torch.full((T, T), -math.inf).triu(1)
    for n, (H, G) in enumerate(zip(HEADS, KV_HEADS)):
        p = {key.removeprefix(f"transformer.layers.{n}."): value for key, value in w.items()}
        qkv = rms(x, p["attn_norm.weight"]) @ p["attn.qkv_proj.weight"].T
        q, k, v = qkv.view(B, T, H + 2 * G, K).transpose(1, 2).split([H, G, G], 1)
        q, k = turn(rms(q, p["attn.q_norm.weight"])), turn(rms(k, p["attn.k_norm.weight"]))
        k, v = (y.repeat_interleave(H // G, 1) for y in (k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(K) + future).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).reshape(B, T, H * K) @ p["attn.out_proj.weight"].T
        gate, up = (rms(x, p["ffn_norm.weight"]) @ p["ffn.proj_1.weight"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ p["ffn.proj_2.weight"].T
    x = rms(x, w["transformer.norm.weight"])
    return x @ w["transformer.token_embeddings.weight"].T, x


def main():
    shapes = {"transformer.token_embeddings.weight": [V, D], "transformer.norm.weight": [D]}
    for n, (H, G, share) in enumerate(zip(HEADS, KV_HEADS, SHARES)):
        F = width(share)
        sizes = {"attn_norm": [D], "ffn_norm": [D], "attn.q_norm": [K], "attn.k_norm": [K],
                 "attn.qkv_proj": [(H + 2 * G) * K, D], "attn.out_proj": [D, H * K], "ffn.proj_1": [2 * F, D],
                 "ffn.proj_2": [D, F]}  # fmt: skip
        shapes |= {f"transformer.layers.{n}.{name}.weight": size for name, size in sizes.items()}
    tokens = np.random.default_rng(0).integers(0, V, (2, 14))
    mask = np.ones_like(tokens)
    mask[1, 9:] = 0  # what a causal model computes before the padding does not depend on it
    with torch.no_grad():
        logits, hidden = forward(
            {k: torch.from_numpy(x) for k, x in weights_of(shapes).items()}, torch.from_numpy(tokens)
        )
    np.savez_compressed(ORACLE / "openelm.npz", tokens=tokens, mask=mask, logits=logits, hidden=hidden[None])
    config = {
        "model_type": "openelm", "architectures": ["OpenELMForCausalLM"], "vocab_size": V, "model_dim": D,
        "head_dim": K, "num_transformer_layers": 4, "num_query_heads": HEADS, "num_kv_heads": KV_HEADS,
        "ffn_multipliers": SHARES,
        "ffn_dim_divisor": DIVISOR, "ffn_with_glu": True, "activation_fn_name": "swish", "num_gqa_groups": 2,
        "normalization_layer_name": "rms_norm", "normalize_qk_projections": True, "share_input_output_layers": True,
        "rope_freq_constant": 10000, "max_context_length": 64, "torch_dtype": "float32",
    }  # fmt: skip
    record = {"transformers": None, "config": config, "shapes": shapes}
    (ORACLE / "openelm.json").write_text(json.dumps(record, indent=1) + "\n")
    print("largest logit", float(logits.abs().max()))


if __name__ == "__main__":
    main()
