"""Tiny models of each architecture that GGUF files are written for, with weights that let mistakes show."""

import dataclasses
import math

import jax
import numpy as np

import slm
from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.interop.families import FAMILIES
from slm.interop.gguf_sentencepiece import SPACE
from slm.models.language_model import LanguageModel, Origin
from slm.models.transformer import Transformer

TEXT = "the cat sat on the mat, the dog sat on the cat, 2048 mats and hats. " * 20
NONE = MixerConfig(qk_norm="none")
LLAMA = ModelConfig(
    vocab_size=288, layers=2, width=64, heads=4, kv_heads=2, mlp_width=96, mixer=NONE, tied=False
)  # fmt: skip
GEMMA = dataclasses.replace(
    LLAMA, mlp="geglu", norm="zero_centered_rmsnorm", embedding_scale=8.0, tied=True, head_dim=24
)
LAYERNORM = {"norm": "layernorm", "mlp": "gelu", "norm_eps": 1e-5}
LONG = RopeConfig(
    theta=100.0, scaling="longrope", factor=2.0, original_length=512, magnitude=1.1,
    short_factors=tuple(1 + 0.1 * i for i in range(6)), long_factors=tuple(1 + 0.5 * i for i in range(6)),
)  # fmt: skip
MODELS = {
    "llama of pieces": dataclasses.replace(LLAMA, vocab_size=330),
    "llama": LLAMA,
    "llama biased": dataclasses.replace(LLAMA, bias=("qkv", "out")),
    "llama 3": dataclasses.replace(
        LLAMA, tied=True,
        rope=RopeConfig(theta=500.0, scaling="llama3", factor=4.0, original_length=16, slow=1.0, fast=4.0),
    ),
    "qwen2": dataclasses.replace(LLAMA, bias=("qkv",)),
    "qwen3": dataclasses.replace(LLAMA, mixer=MixerConfig(), head_dim=32, tied=True),
    "granite": dataclasses.replace(
        LLAMA, embedding_scale=6.0, residual_scale=0.22, logit_divisor=1.7, tied=True,
        mixer=dataclasses.replace(NONE, scale=0.2),
    ),
    "smollm3": dataclasses.replace(LLAMA, layers=8, attention=("softmax",) * 3 + ("nope_softmax",)),
    "gemma": GEMMA,
    "gemma2": dataclasses.replace(
        GEMMA, layers=4, attention=("window", "softmax"), residual="sandwich", logit_softcap=4.0,
        mixer=dataclasses.replace(NONE, scale=24**-0.5, softcap=3.0, window=5),
    ),
    "gemma3": dataclasses.replace(
        GEMMA, layers=7, attention=("window",) * 5 + ("softmax",), residual="sandwich",
        rope=RopeConfig(theta=1000.0, local_theta=50.0, scaling="linear", factor=8.0),
        mixer=MixerConfig(scale=24**-0.5, softcap=None, window=5),
    ),
    "gemma3 in an order of its own": dataclasses.replace(
        GEMMA, layers=4, attention=("softmax", "window"), residual="sandwich",
        rope=RopeConfig(theta=1000.0, local_theta=50.0), mixer=MixerConfig(scale=24**-0.5, window=5),
    ),
    "phi2": dataclasses.replace(
        LLAMA, **LAYERNORM, kv_heads=4, bias=("qkv", "out", "mlp", "norm", "head"), residual="parallel_shared",
        mixer=dataclasses.replace(NONE, rope_fraction=0.5),
    ),
    "phi3": dataclasses.replace(LLAMA, mlp="swiglu"),
    "phi3 short": dataclasses.replace(LLAMA, rope=LONG, mixer=dataclasses.replace(NONE, rope_fraction=0.75)),
    "phi3 long": dataclasses.replace(
        LLAMA, rope=dataclasses.replace(LONG, original_length=16),
        mixer=dataclasses.replace(NONE, rope_fraction=0.75),
    ),
    "gpt2": dataclasses.replace(
        LLAMA, **LAYERNORM, kv_heads=None, bias=("qkv", "out", "mlp", "norm"), position="learned", max_length=64,
        tied=True,
    ),
    "gptneox": dataclasses.replace(
        LLAMA, **LAYERNORM | {"mlp": "gelu_erf"}, kv_heads=None, bias=("qkv", "out", "mlp", "norm"),
        residual="parallel", mixer=dataclasses.replace(NONE, rope_fraction=0.25),
    ),
    "mamba2": ModelConfig(
        vocab_size=288, layers=2, width=64, heads=8, head_dim=16, attention=("mamba2",), position="none", mlp="none",
        mixer=MixerConfig(expand_k=2.0, expand_v=1.0, groups=2, conv=4),
    ),
}  # fmt: skip
"""Name to model; the first word is the architecture that it is written as."""
FAMILY = {"phi3": "phi3"}
"""The family that a model comes from, where another one could express it too."""


def pieces(prefix: bool = True) -> dict:
    """Metadata of a tokenizer as SentencePiece makes them, bytes, characters, words' beginnings."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|user|>"]
    types = [2, 3, 3, *[6] * 256, 4]
    scores = [0.0] * len(tokens)
    words = TEXT.replace(" ", SPACE).split(SPACE)
    longer = {SPACE + word[:n] for word in words for n in range(1, len(word) + 1)} | {
        "at",
        "he",
        "th",
        "cat",
        SPACE * 2,
    }
    for rank, piece in enumerate([SPACE, *sorted(set("".join(words))), *sorted(longer - {SPACE})]):
        tokens.append(piece)
        types.append(1)
        scores.append(-float(rank * 7 % 61))
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip


def made(name: str, tokenizer) -> LanguageModel:
    """With matrices that keep the size of what passes through them, and norms and biases that are not all alike."""
    cfg = MODELS[name]
    draw = np.random.default_rng(0)

    def weight(path, x):
        z = draw.standard_normal(x.shape).astype(np.float32)
        leaf = jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[-1]
        if leaf == "kernel":
            return jax.numpy.asarray(1.2 * z / math.sqrt(x.shape[-2]))
        return x + (0.3 * z if leaf != "embedding" else z / math.sqrt(cfg.width))

    params = jax.tree_util.tree_map_with_path(weight, Transformer(cfg).init(jax.random.key(0)))
    origin = None
    if name in FAMILY:
        hf = FAMILIES[FAMILY[name]].write(cfg) | {"max_position_embeddings": 128}
        origin = Origin(FAMILY[name], hf, "float32", {})
    return LanguageModel(params, slm.Experiment(model=cfg), tokenizer, origin=origin)
