"""Tensors that llama.cpp stores otherwise than Hugging Face.

Each function takes (name in Hugging Face, tensor, config, back) and gives the tensor as GGUF has it, or, with `back`,
the inverse. Tensors that are stored alike pass through.
"""

import numpy as np

from slm.config import ModelConfig


def unchanged(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    return data


def interleaved(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """Rows of each head of queries and keys from half-split to interleaved rotary order, or back."""
    if not (".q_proj." in theirs or ".k_proj." in theirs):
        return data
    heads = cfg.heads if ".q_proj." in theirs else cfg.kv_heads or cfg.heads
    shape = (heads, -1, 2) if back else (heads, 2, data.shape[0] // heads // 2)
    return data.reshape(*shape, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


def raised(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """Norms about one become plain norms."""
    return data + np.float32(-1 if back else 1) if theirs.endswith("norm.weight") else data


def transposed(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """GPT-2's (in, out) matrices stand as (out, in)."""
    return data.T if theirs.split(".")[-2].startswith("c_") else data


def grouped(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """GPT-NeoX's queries, keys and values, which take turns from head to head, stand one after the other."""
    if ".query_key_value." not in theirs:
        return data
    shape = (3, cfg.heads) if back else (cfg.heads, 3)
    return data.reshape(*shape, -1, *data.shape[1:]).swapaxes(0, 1).reshape(data.shape)


def scanned(theirs: str, data: np.ndarray, cfg: ModelConfig, back: bool) -> np.ndarray:
    """Mamba-2's decays are stored as they are used, its vectors with the axes that llama.cpp broadcasts."""
    name = theirs.partition(".mixer.")[2]
    if name == "A_log":
        return np.log(-data.reshape(-1)) if back else -np.exp(data)[:, None]
    if name == "D":
        return data.reshape(-1) if back else data[:, None]
    if name == "norm.weight":
        return data.reshape(-1) if back else data.reshape(cfg.mixer.groups or 1, -1)
    if name == "conv1d.weight":
        return data[:, None] if back else data[:, 0]
    return data
