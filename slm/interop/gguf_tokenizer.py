"""Tokenizers in GGUF files: byte-level BPE, whose splitting rule llama.cpp knows by a name, and SentencePiece's BPE."""

import json
from typing import Any

from slm.errors import CheckpointError, ConfigError
from slm.interop.gguf_sentencepiece import CONTROL, NORMAL, UNUSED, USER, is_pieces, read_pieces, write_pieces

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|\p{N}" + _REST


def _bytes(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*parts: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(parts)}


SPLITTERS: dict[str, dict] = {
    "gpt-2": _bytes(True),
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _bytes(True)),
    "llama-bpe": _sequence(_split(_LLAMA3), _bytes(False)),
    "qwen2": _sequence(_split(_QWEN2), _bytes(False)),
}
"""Name in tokenizer.ggml.pre to the splitting rule as tokenizer.json has it."""
_SAME = {
    "default": "gpt-2", "phi-2": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2", "smaug-bpe": "llama-bpe",
    "llama3": "llama-bpe", "refact": "smollm", "starcoder": "smollm", "command-r": "smollm",
}  # fmt: skip
"""Other names in tokenizer.ggml.pre with the rule of one above, as llama.cpp reads them."""


def read_tokenizer(fields: dict[str, Any]) -> dict:
    """tokenizer.json, as an object, of a GGUF file's metadata.

    Raises CheckpointError for a kind that is neither byte-level BPE nor SentencePiece's, a splitting rule that has no
    name here, or damage.
    """
    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    rule = _SAME.get(rule, rule)
    if kind == "llama":
        found = read_pieces(fields)
    elif kind == "gpt2" and rule in SPLITTERS:
        found = _read_bytes(fields, rule)
    else:
        raise CheckpointError(
            f"this GGUF file has a tokenizer of kind {kind!r} with the splitting rule {rule!r}; read are llama, and "
            f"gpt2 with {', '.join(SPLITTERS)}: put the model's tokenizer.json beside the file"
        )
    first = fields.get("tokenizer.ggml.bos_token_id")
    # Left out, it means what llama.cpp takes it for.
    if first is not None and fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or rule == "llama-bpe"):
        found["post_processor"] = _before(fields["tokenizer.ggml.tokens"][first], int(first))
    return found


def _before(token: str, number: int) -> dict:
    """Puts a token in front of each text."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _read_bytes(fields: dict[str, Any], rule: str) -> dict:
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == CONTROL}
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER)
    ]  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": rule == "llama-bpe",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ", 1) for merge in fields.get("tokenizer.ggml.merges", [])],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if rule == "qwen2" else None, "pre_tokenizer": SPLITTERS[rule],
        "post_processor": None, "decoder": _bytes(True), "model": model,
    }  # fmt: skip


def write_tokenizer(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """GGUF metadata of a slm.data.tokenizers.Tokenizer: model, pre, tokens, types; merges, or scores and space_prefix.

    Raises ConfigError for a tokenizer that llama.cpp has no name for.
    """
    parts = json.loads(tokenizer.backend.to_str())
    names = {number: name for name, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    if is_pieces(parts):
        return {"model": "llama", "pre": "default"} | write_pieces(parts, names, vocab_size)
    rule = next((name for name, splitter in SPLITTERS.items() if splitter == parts["pre_tokenizer"]), None)
    if parts["pre_tokenizer"] == _bytes(False) and not parts["model"].get("merges"):
        rule = "gpt-2"  # where bytes are tokens, it does not matter where texts are split
    if parts["model"]["type"] != "BPE" or rule is None:
        raise ConfigError(
            f"this tokenizer ({parts['model']['type']}, split by {json.dumps(parts['pre_tokenizer'])[:80]}) has no "
            f"name in GGUF that is known here; known are SentencePiece's BPE and byte-level BPE with the rules of "
            f"{', '.join(SPLITTERS)}"
        )
    added = {token["id"]: token for token in parts["added_tokens"]}
    tokens, types = [], []
    for number in range(vocab_size):
        tokens.append(names.get(number, f"[PAD{number}]"))
        special = CONTROL if number in added and added[number]["special"] else USER
        types.append(special if number in added else NORMAL if number in names else UNUSED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    return {"model": "gpt2", "pre": rule, "tokens": tokens, "types": types, "merges": merges}
