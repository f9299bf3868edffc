"""Where text comes from: a spec such as `cpython`, `book.txt` or `tfds:lm1b/train` becomes a stream of documents."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slm.config import DataConfig
from slm.errors import DataError

SCHEMES = ("tfds:", "synthetic:")


@dataclass(frozen=True)
class Source:
    """A text source. Iterating twice gives the same documents in the same order."""

    name: str
    """The spec it was opened from."""
    fingerprint: str
    """Changes when the content changes."""
    read: Callable[[], Iterator[str]]
    """Starts a fresh pass over the raw documents, empty ones included."""

    def documents(self) -> Iterator[str]:
        """Streams the documents that hold text. Raises DataError if there are none."""
        empty = True
        for text in self.read():
            if text:
                empty = False
                yield text
        if empty:
            raise DataError(f"{self.name} holds no text: every document is empty, or there are none")


def open_source(spec: str, data: DataConfig) -> Source:
    """Opens one entry of `data.source` or `data.validation`, reading only what its fingerprint needs.

    `cpython`           documentation topics and standard library of the running interpreter (see slm.data.cpython)
    `tfds:NAME/SPLIT`   a TFDS data set in ArrayRecord format; NAME may hold a config, SPLIT a slice: `train[:10%]`
    `*.jsonl[.gz]`, `*.parquet`   one document a record, in `data.text_field`
    `synthetic:passkey` the text that the task hides its keys in
    any other file      UTF-8 text, one document
    a folder            its text files (slm.data.files.TEXT_SUFFIXES), recursively, one document each

    Raises DataError if it does not exist (naming the nearest that does), is empty or cannot be read.
    """
    if spec == "cpython":
        from slm.data.cpython import cpython_source

        return cpython_source()
    if spec.startswith("tfds:"):
        from slm.data.tfds_source import tfds_source

        return tfds_source(spec, data)
    if spec.startswith("synthetic:"):
        from slm.data.synthetic import asks_text, parse_task

        if not asks_text(spec):
            raise DataError(f"{spec} has no text to read: synthetic tasks are only for training and evaluation")
        return open_source(parse_task(spec).text, data)
    from slm.data import files

    path = Path(spec).expanduser()
    if not spec.strip():
        raise DataError("a source has an empty name: write a path or cpython, or leave it out")
    if not path.exists():
        raise DataError(f"no source '{spec}': {_nearest(spec, path)}")
    if path.is_dir():
        return files.folder_source(spec, path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return files.jsonl_source(spec, path, data.text_field)
    if path.suffix == ".parquet":
        return files.parquet_source(spec, path, data.text_field)
    return files.text_source(spec, path)


def names_a_source(text: str) -> bool:
    """Whether a string given for evaluation is meant as a source rather than as text to be evaluated itself.

    A known scheme, `cpython`, an existing path, or one word that looks like a path (so that a misspelt one is refused
    instead of being evaluated as a short text).
    """
    if text == "cpython" or text.startswith(SCHEMES):
        return True
    if not text.strip() or len(text) > 1000 or "\n" in text:
        return False
    looks_like_path = "/" in text or Path(text).suffix in (".txt", ".md", ".jsonl", ".gz", ".parquet")
    return Path(text).expanduser().exists() or (looks_like_path and not any(c.isspace() for c in text))


def _nearest(spec: str, path: Path) -> str:
    """What the user may have meant: a name in the deepest folder of the path that exists."""
    kinds = "cpython, a text file or folder, FILE.jsonl, FILE.parquet, tfds:NAME/SPLIT, synthetic:TASK"
    if "/" not in spec:
        scheme, colon, rest = spec.partition(":")
        names = [scheme + ":" for scheme in ("tfds", "synthetic")] if colon else ["cpython"]
        if near := difflib.get_close_matches(scheme + colon, names, n=1):
            return f"did you mean {near[0]}{rest}?"
    elif near := difflib.get_close_matches(spec.split(":")[0] + ":", SCHEMES, n=1, cutoff=0.7):
        return f"did you mean {near[0]}{spec.partition(':')[2]}?"
    while not path.parent.is_dir():
        path = path.parent
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.5)
    if near:
        return f"{path} does not exist; did you mean {path.parent / near[0]}?"
    return f"{path} does not exist; a source is {kinds}"
