"""Text to token ids and back: bytes, characters, byte-level BPE trained on the spot, or any tokenizer.json."""

import contextlib
import difflib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm.data.cache import digest
from slm.data.token_bytes import byte_alphabet, utf8_bytes_per_token
from slm.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
# What foreign tokenizers call the token between documents, best first. Where a tokenizer has both, <|endoftext|>
# separates documents and the others end chat turns (Qwen, SmolLM); the begin-of-text tokens come last.
_SEPARATORS = (
    END_OF_TEXT, "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>", "[EOS]", "<|eot_id|>", "<|im_end|>", "[SEP]",
    "<|begin_of_text|>", "<bos>", "<s>", "[CLS]",
)  # fmt: skip

_SAMPLE_CHARACTERS = 10 * 2**20
_PIECE_CHARACTERS = 2**14


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a language model needs beside it."""

    def __init__(self, backend: Any):
        backend.no_truncation()
        backend.no_padding()
        # A document that mentions <|endoftext|> must not end there: markers in text are plain text.
        backend.encode_special_tokens = True
        self.backend = backend
        """The wrapped tokenizers.Tokenizer."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        """Number of ids."""
        self.end_of_text_token: str | None = next((name for name in _SEPARATORS if name in vocabulary), None)
        """The token put at the start of each document; None if this tokenizer has nothing that could serve."""
        self.end_of_text: int | None = vocabulary.get(self.end_of_text_token)
        """Its id."""
        self.mask: int | None = vocabulary.get("[MASK]", vocabulary.get("<mask>"))
        """Id of the token that hides others from a masked language model; None if this tokenizer has none."""
        self._json = backend.to_str()
        self.fingerprint: str = digest(self._json)
        """Changes when any id may change."""

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a folder. Raises DataError if it is missing or damaged."""
        from tokenizers import Tokenizer as Backend

        path = Path(path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"no tokenizer {path}")
        try:
            return cls(Backend.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Writes a tokenizer.json (into `path` if that is a folder) and returns where."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        path.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        return path

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 (V,): UTF-8 bytes that each token stands for, special tokens 0 (see slm.data.token_bytes)."""
        return utf8_bytes_per_token(json.loads(self._json), self.backend.get_vocab(), self.vocab_size)

    def encode(self, text: str, markers: bool = False) -> np.ndarray:
        """int32 (T,): ids of `text`, nothing added.

        markers: special tokens written in the text (`<|im_start|>`) become their ids, as a chat prompt wants and a
        document must not. Not safe while other threads encode.
        Raises DataError if the text holds a lone surrogate, which UTF-8 cannot express, or what a tokenizer without an
        unknown token has no token for.
        """
        if not markers:
            return self.encode_batch([text])[0]
        self.backend.encode_special_tokens = False
        try:
            with _unknown_text():
                return np.array(self.backend.encode(_valid(text), add_special_tokens=False).ids, np.int32)
        finally:
            self.backend.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32; all cores work on it."""
        texts = [_valid(text) for text in texts]
        if self._table is not None:
            unit, table = self._table
            return [table[np.frombuffer(text.encode(_CODECS[unit]), unit)] for text in texts]
        pieces = [list(self._pieces(text)) for text in texts]
        flat = [piece for group in pieces for piece in group]
        with _unknown_text():
            encodings = self.backend.encode_batch_fast(flat, add_special_tokens=False)
        ids = (np.array(e.ids, np.int32) for e in encodings)
        return [np.concatenate([next(ids) for _ in group]) if group else np.zeros(0, np.int32) for group in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens leave no trace, bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @functools.cached_property
    def _table(self) -> tuple[type, np.ndarray] | None:
        """Without merges a token is a byte or a character, and a table does at memory speed what BPE would."""
        if '"merges":[]' not in self._json:
            return None
        parts = json.loads(self._json)
        model, splitter = parts["model"], parts["pre_tokenizer"]
        if model["type"] != "BPE" or model["merges"] or parts["normalizer"]:
            return None
        if splitter == _parts(use_regex=False):
            if all(character in model["vocab"] for character in byte_alphabet()):
                return np.uint8, np.array([model["vocab"][c] for c in byte_alphabet()], np.int32)
        elif splitter is None and model["unk_token"] in model["vocab"] and not model["byte_fallback"]:
            table = np.full(0x110000, model["vocab"][model["unk_token"]], np.int32)
            for token, number in model["vocab"].items():
                if len(token) == 1:
                    table[ord(token)] = number
            return np.uint32, table
        return None

    @functools.cached_property
    def _splits_at_newlines(self) -> bool:
        parts = json.loads(self._json)
        return parts["pre_tokenizer"] == _parts(use_regex=True) and parts["normalizer"] is None

    def _pieces(self, text: str) -> Iterator[str]:
        """Cuts a long text where GPT-2's splitting rule cuts anyway, to bound memory and to use all cores.

        Between a single newline and what follows it the rule never joins; other tokenizers take the text whole.
        """
        start, size = 0, 2**18
        while self._splits_at_newlines and len(text) - start > size:
            cut = text.find("\n", start + size)
            while cut != -1 and (text[cut - 1 : cut].isspace() or text[cut + 1 : cut + 2].isspace()):
                cut = text.find("\n", cut + 1)
            if cut == -1:
                break
            yield text[start : cut + 1]
            start = cut + 1
        yield text[start:]


_CODECS = {np.uint8: "utf-8", np.uint32: "utf-32-le"}


def _parts(use_regex: bool) -> dict:
    """How tokenizer.json writes the byte-level pre-tokenizers that are built here."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


@contextlib.contextmanager
def _unknown_text() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"the tokenizer has no token for some of the text ({error})") from error


def _valid(text: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"the text holds a lone surrogate at character {error.start}: it is not Unicode") from error
    return text


def build_tokenizer(spec: str, documents: Callable[[], Iterator[str]]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    `bytes`: id = byte value, 256 ends a text. `chars`: the characters of the documents. `bpe:SIZE`: byte-level BPE
    trained on up to 10 MB spread evenly over the documents; the same documents give the same tokenizer. Anything else
    is a path. `documents` starts a pass over the training documents, and is called only by those that need it.
    Raises ConfigError for a SIZE that is not a number from 257 on and for a name that is neither; DataError if the
    documents do not support SIZE.
    """
    if spec == "bytes":
        return _bytes()
    if spec == "chars":
        return _chars(documents())
    if spec.startswith("bpe:"):
        return _bpe(_bpe_size(spec), documents)
    if not Path(spec).expanduser().exists():
        near = difflib.get_close_matches(spec.split(":")[0], ["bytes", "chars", "bpe"], n=1)
        hint = f"did you mean {near[0]}{':SIZE' if near[0] == 'bpe' else ''}?" if near else "there is no such file"
        raise ConfigError(f"data.tokenizer = {spec!r}: {hint} (bytes, chars, bpe:SIZE, or a tokenizer.json)")
    return Tokenizer.load(spec)


def depends_on_documents(spec: str) -> bool:
    """Whether the tokenizer is made from the training documents."""
    return spec == "chars" or spec.startswith("bpe:")


def planned_vocabulary(spec: str, hides: bool = False) -> int | None:
    """Size of the tokenizer that `spec` names, and of a mask token if `hides` and it needs one of its own, as far as no
    document is needed to know it; None: one is. `bpe:SIZE` counts as SIZE, which few documents may not fill."""
    if spec.startswith("bpe:") and spec.removeprefix("bpe:").isdecimal():
        return int(spec.removeprefix("bpe:")) + hides
    if depends_on_documents(spec):
        return None
    tokenizer = build_tokenizer(spec, lambda: iter(()))
    return tokenizer.vocab_size + (hides and tokenizer.mask is None)


def _bpe_size(spec: str) -> int:
    size = spec.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < 257:
        raise ConfigError(f"data.tokenizer = {spec!r}: SIZE must be a number from 257 on (256 bytes and end of text)")
    return int(size)


def _bytes() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def _chars(documents: Iterable[str]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    characters: set[str] = set()
    for text in documents:
        characters.update(text)
    vocabulary = {character: number for number, character in enumerate([*sorted(characters), UNKNOWN])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def _bpe(size: int, documents: Callable[[], Iterator[str]]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=byte_alphabet(), show_progress=False
    )
    backend.train_from_iterator(spread_sample(documents, _SAMPLE_CHARACTERS), trainer)
    reached = backend.get_vocab_size()
    if reached < size:
        raise DataError(f"data.tokenizer = 'bpe:{size}': the training text yields only {reached} tokens: ask for fewer")
    return Tokenizer(backend)


def spread_sample(documents: Callable[[], Iterator[str]], limit: int) -> Iterator[str]:
    """About `limit` characters taken evenly from all of the documents, in order; all of them if they are fewer."""
    total = sum(map(len, documents()))
    seen = taken = 0
    for text in documents():
        for start in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[start : start + _PIECE_CHARACTERS]
            seen += len(piece)
            if total <= limit or taken + len(piece) <= seen * limit / total:
                taken += len(piece)
                yield piece
