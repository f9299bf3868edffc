"""Text files, folders of them, JSON lines and Parquet, as sources."""

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from slm.data.cache import digest
from slm.data.sources import Source
from slm.errors import DataError

TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".css", ".yaml", ".yml", ".toml", ".sql"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".java", ".go", ".rs", ".rb", ".sh"}
    | {".r", ".jl", ".hs", ".lua"}
)
"""What is read from a folder; any file may be named by itself."""

# Up to here the fingerprint is the content itself (a copy or a fresh checkout finds its cache again, and an edit that
# keeps the size is noticed); beyond, size and time of change stand for it.
_HASHED_BYTES = 32 * 2**20


def text_source(spec: str, path: Path) -> Source:
    return Source(spec, _fingerprint([path], path.parent), lambda: iter([read_text(path)]))


def folder_source(spec: str, folder: Path) -> Source:
    """The text files below `folder`, one document each. Raises DataError, naming what else is there, if none is."""
    paths = folder_paths(folder)
    if not paths:
        others = sorted({path.suffix for path in folder.rglob("*") if path.is_file() and path.suffix})
        found = f"; it holds {', '.join(others[:8])} files: name one of them directly" if others else ""
        raise DataError(f"{spec}: no text files (.txt, .md, .py, ...) in this folder{found}")
    return Source(spec, _fingerprint(paths, folder), lambda: (read_text(path) for path in paths))


def folder_paths(folder: Path) -> list[Path]:
    """Text files, recursively, in order of their names; hidden ones are left out."""

    def wanted(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix.lower() in TEXT_SUFFIXES and not hidden and path.is_file()

    return sorted(path for path in folder.rglob("*") if wanted(path))


def read_text(path: Path) -> str:
    """A whole UTF-8 file, without the byte-order mark. Raises DataError naming the first bad byte."""
    with _readable(path):
        raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} ({error.reason}); "
            "convert it (iconv -t utf-8) or leave it out"
        ) from error


def jsonl_source(spec: str, path: Path, text_field: str) -> Source:
    """One JSON object a line, perhaps gzipped."""

    def read() -> Iterator[str]:
        with _readable(path), gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_text(line, text_field, f"{path}:{number}")

    return Source(spec, digest(_fingerprint([path], path.parent), text_field), read)


def _json_text(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object was expected, not {type(record).__name__}")
    if text_field not in record:
        raise DataError(missing_field(where, text_field, list(record)))
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field '{text_field}' holds {type(text).__name__}, not text")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: field '{text_field}' holds half a surrogate pair (\\ud800 ...), which is not text")
    return text


def parquet_source(spec: str, path: Path, text_field: str) -> Source:
    """One row a document; reads only the text column, batch by batch."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{spec}: reading Parquet needs pyarrow: pip install 'slm[parquet]'") from error
    with _readable(path):
        try:
            schema = parquet.read_schema(path)
        except arrow.ArrowException as error:
            raise DataError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error
    if text_field not in schema.names:
        raise DataError(missing_field(str(path), text_field, schema.names))
    kind = schema.field(text_field).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column '{text_field}' holds {kind}, not text")

    def read() -> Iterator[str]:
        try:
            with _readable(path), parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                    for text in batch.column(0).to_pylist():
                        yield text or ""  # a null is a row without text
        except arrow.ArrowException as error:
            raise DataError(f"{path} is damaged: {str(error).splitlines()[0]}") from error

    return Source(spec, digest(_fingerprint([path], path.parent), text_field), read)


def missing_field(where: str, text_field: str, fields: list[str]) -> str:
    return f"{where}: no field '{text_field}'; it has {', '.join(map(str, fields))}: set data.text_field to one of them"


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    except PermissionError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _fingerprint(paths: list[Path], root: Path) -> str:
    stats = [path.stat() for path in paths]
    hashed = sum(stat.st_size for stat in stats) <= _HASHED_BYTES
    entries = []
    for path, stat in zip(paths, stats):
        with _readable(path):
            content = hashlib.blake2b(path.read_bytes()).hexdigest() if hashed else (stat.st_size, stat.st_mtime_ns)
        entries.append((str(path.relative_to(root)), content))
    return digest(entries)
