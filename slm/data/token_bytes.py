"""How many UTF-8 bytes of text each token stands for: what turns nats per token into bits per byte."""

import re

import numpy as np

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def utf8_bytes_per_token(tokenizer: dict, vocabulary: dict[str, int], size: int) -> np.ndarray:
    """int32 (size,): UTF-8 bytes of each token; special tokens and the unknown token count 0.

    `tokenizer` is the content of a tokenizer.json. Exact for byte-level and for character tokenizers. Otherwise as near
    as a sum over tokens can be: Metaspace counts the space that it may put before a text (one byte too many a
    document); WordPiece and WordLevel count one byte for the white space before each word, whatever it was; what a
    normalizer has changed (case, accents) is counted as it stands in the vocabulary.
    """
    model = tokenizer["model"]
    parts = list(_types(tokenizer))
    byte_level = "ByteLevel" in parts
    prefix = model.get("continuing_subword_prefix") if model["type"] == "WordPiece" else None
    words = model["type"] in ("WordPiece", "WordLevel")
    suffix = model.get("end_of_word_suffix") or None

    def length(token: str) -> int:
        if byte_level:
            return len(token)
        if _BYTE_TOKEN.fullmatch(token):
            return 1
        if prefix and token.startswith(prefix):
            return len(token.removeprefix(prefix).encode())
        if suffix and token.endswith(suffix):
            token = token.removesuffix(suffix) + " "
        return len(token.replace("▁", " ").encode()) + words

    lengths = np.zeros(size, np.int32)
    for token, number in vocabulary.items():
        lengths[number] = length(token)
    for added in tokenizer["added_tokens"]:
        lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in vocabulary:
        lengths[vocabulary[unknown]] = 0
    if model.get("unk_id") is not None:  # Unigram
        lengths[model["unk_id"]] = 0
    return lengths


def _types(node: object):
    """Every `type` in a tree of pre-tokenizers, decoders and the like, the model's own left out."""
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node["type"]
        for key, value in node.items():
            if key not in ("model", "added_tokens"):
                yield from _types(value)
    elif isinstance(node, list):
        for value in node:
            yield from _types(value)
