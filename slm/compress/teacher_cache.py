"""A teacher's likeliest tokens for the windows of a training corpus, on disk: written once, read by many runs.

    slm.cache_teacher("teachers/big", slm.load_config("configs/student.py"), "teachers/big_top32")
    python train.py configs/student.py --distill.cached teachers/big_top32

A folder holds header.json and, for each source of the data, rows_N.npy (which windows) and source_N.bin: one record a
window, with T times (k ids, k log-probabilities, the log of what is left): 4 k + 2 bytes a token for vocabularies of at
most 65,536. Windows, not steps, since windows never move (slm.data.packing): the cache serves any seed, batch size and
number of devices. slm.compress.cache_teacher writes it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from slm.compress.distill import CACHED
from slm.errors import DataError

HEADER, FORMAT = "header.json", 1


@dataclasses.dataclass(frozen=True)
class CachedTeacher:
    """An open cache."""

    folder: Path
    top_k: int
    dtype: str
    """Of log-probabilities."""
    rows: tuple[np.ndarray, ...]
    """For each source the windows that are there, in rising order."""
    records: tuple[np.ndarray, ...]
    """For each source one record a window, memory-mapped."""

    def read(self, source: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
        """Entries of a batch for windows as Data.drawn names them: (B, T, k) ids, (B, T, k) and (B, T) logs.

        Raises DataError for a window that is not there.
        """
        batch: dict[str, np.ndarray] = {}
        for number in np.unique(source):
            mine = source == number
            rows, wanted = self.rows[number], index[mine]
            at = np.searchsorted(rows, wanted)
            lacking = np.append(rows, -1)[at] != wanted
            if lacking.any():
                raise DataError(
                    f"distill.cached = {self.folder} lacks window {wanted[lacking][0]} of source {number}: "
                    "it was written for another seed, fewer train.steps or smaller batches; write it with these, or "
                    "with whole = True"
                )
            part = self.records[number][at]
            for name in CACHED:
                value = part[name].astype(np.int32) if name == CACHED[0] else part[name]
                whole = batch.setdefault(name, np.empty((len(source), *value.shape[1:]), value.dtype))
                whole[mine] = value
        return batch


def open_cached(folder: str | Path, data: Any, length: int) -> CachedTeacher:
    """The cache in `folder` for `data` (slm.data.pipeline.Data) in windows of `length` tokens.

    Raises DataError, naming what differs, if it is of other data, or if there is none, or it is not complete.
    """
    folder = Path(folder)
    header = read_header(folder)
    wanted = header_of(data, length)
    for name, (field, value) in wanted.items():
        found = header.get(name, [None, None])[1]
        if found != value:
            raise DataError(
                f"distill.cached = {folder} was written for another {field} ({found}, now {value}): write it again "
                "with slm.cache_teacher, or set back what has changed"
            )
    record = record_of(length, header["top_k"], header["vocab_size"], header["dtype"])
    rows, records = [], []
    for number, count in enumerate(header["windows"]):
        path = folder / f"source_{number}.bin"
        size = path.stat().st_size if path.exists() else 0
        if size != count * record.itemsize:
            raise DataError(
                f"distill.cached = {folder} is not complete: {size // record.itemsize} of {count} windows of source "
                f"{number} are there; run slm.cache_teacher again with the same settings to go on"
            )
        rows.append(np.load(folder / f"rows_{number}.npy"))
        records.append(np.memmap(path, record, "r", shape=(count,)) if count else np.zeros(0, record))
    return CachedTeacher(folder, header["top_k"], header["dtype"], tuple(rows), tuple(records))


def header_of(data, length: int) -> dict[str, Any]:
    """What must be the same for a cache to hold: name to (the field that decides it, value)."""
    return {
        "format": ["format of caches", FORMAT],
        "sequence_length": ["data.sequence_length", length],
        "tokenizer": ["data.tokenizer", data.tokenizer.fingerprint],
        "data": ["data.source, data.packing or another field of data", data.fingerprint],
    }


def record_of(length: int, top_k: int, vocab_size: int, dtype: str) -> np.dtype:
    """One window, on disk."""
    ids = np.uint16 if vocab_size <= 2**16 else np.int32
    shapes = ((ids, (length, top_k)), (np.dtype(dtype), (length, top_k)), (np.dtype(dtype), (length,)))
    return np.dtype([(name, *shape) for name, shape in zip(CACHED, shapes, strict=True)])


def read_header(folder: Path) -> dict:
    """Raises DataError if there is none, or it is damaged."""
    try:
        header = json.loads((folder / HEADER).read_text())
    except FileNotFoundError:
        raise DataError(f"distill.cached: {folder} has no {HEADER}: write it with slm.cache_teacher") from None
    except ValueError as error:
        raise DataError(f"{folder / HEADER} is damaged ({error}): delete the folder and write it again") from error
    return header
