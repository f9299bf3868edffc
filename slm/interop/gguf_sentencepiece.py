"""SentencePiece's BPE in GGUF files: pieces with scores there, merges in tokenizer.json.

SentencePiece joins the neighbours whose joint piece has the highest score; a `tokenizers` BPE joins those whose merge
comes first. So the merges are the ways to cut each piece into two others, in falling order of the whole piece's score.
"""

from typing import Any

from slm.errors import CheckpointError, ConfigError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""Values of tokenizer.ggml.token_type."""
SPACE = "\u2581"
LONGEST = 1000
"""Characters of a piece; longer ones would take quadratic time, and no tokenizer has them."""


def merges_of(pieces: dict[str, float]) -> list[list[str]]:
    """Merges of pieces (text to score), best first; of one piece, longer left parts first.

    Raises CheckpointError for a piece of absurd length.
    """
    if (longest := max(map(len, pieces), default=0)) > LONGEST:
        raise CheckpointError(f"the GGUF file's tokenizer is damaged: a token has {longest} characters")
    found = []
    for piece, score in pieces.items():
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                found.append((score, piece[:cut], piece[cut:]))
    found.sort(key=lambda merge: -merge[0])  # stable
    return [[left, right] for _, left, right in found]


def read_pieces(fields: dict[str, Any]) -> dict:
    """tokenizer.json, as an object, of metadata with tokenizer.ggml.model = llama.

    Raises CheckpointError if they are damaged.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    scores = fields["tokenizer.ggml.scores"]
    if not len(tokens) == len(types) == len(scores):
        raise CheckpointError("the GGUF file's tokenizer is damaged: its lists of tokens, types and scores differ")
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    # Runs of spaces are user-defined in Gemma; they come about by merging like any piece.
    plain = {token: score for token, kind, score in zip(tokens, types, scores)
             if kind == NORMAL or (kind == USER and SPACE in token)}  # fmt: skip
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER}
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (CONTROL, UNKNOWN) or (kind == USER and SPACE not in token)
    ]  # fmt: skip
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    unknown = next((token for token, kind in zip(tokens, types) if kind == UNKNOWN), None)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
        if prefix else replace,
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": BYTE in types, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges_of(plain),
        },
    }  # fmt: skip


def write_pieces(parts: dict, names: dict[int, str], vocab_size: int) -> dict[str, Any]:
    """Metadata (`tokens`, `types`, `scores`, `space_prefix`) of a tokenizer.json with byte fallback.

    Raises ConfigError if its merges are not those that scores of pieces can give.
    """
    model, added = parts["model"], {token["id"]: token for token in parts["added_tokens"]}
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    tokens, types, scores = [], [], []
    for number in range(vocab_size):
        name = names.get(number, f"[PAD{number}]")
        if name == model.get("unk_token"):
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number]["special"] else USER
        elif len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            kind = BYTE
        else:
            kind = NORMAL if number in names else UNUSED
        tokens.append(name)
        types.append(kind)
        scores.append(-float(rank.get(name, len(rank))) if kind in (NORMAL, USER) else 0.0)
    plain = {t: s for t, k, s in zip(tokens, types, scores) if k == NORMAL or (k == USER and SPACE in t)}
    again = merges_of(plain)
    # Merges that give one piece are alike to SentencePiece, whatever their order.
    if [a + b for a, b in again] != [a + b for a, b in merges] or sorted(again) != sorted(merges):
        raise ConfigError("GGUF: the merges of this tokenizer are not those of SentencePiece's scores")
    prefix = any(part.get("type") == "Prepend" for part in _flat(parts["normalizer"]))
    return {"tokens": tokens, "types": types, "scores": scores, "space_prefix": prefix}


def is_pieces(parts: dict) -> bool:
    """Whether a tokenizer.json is SentencePiece's BPE: spaces become \u2581, and nothing is split before merging."""
    normal = [part for part in _flat(parts["normalizer"]) if part["type"] != "Prepend"]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return (
        parts["model"]["type"] == "BPE" and bool(parts["model"].get("byte_fallback")) and normal == [space]
        and parts["pre_tokenizer"] in (None, split)  # Gemma's, which finds no spaces any more
    )  # fmt: skip


def _flat(normalizer: dict | None) -> list[dict]:
    if normalizer is None:
        return []
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
