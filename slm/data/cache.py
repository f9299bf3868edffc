"""Folders that are computed once and shared by all processes on the machine."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from slm.errors import DataError


def cache_folder(configured: str | None) -> Path:
    """`data.cache` if set, else $SLM_CACHE, else ~/.cache/slm."""
    return Path(configured or os.environ.get("SLM_CACHE") or Path.home() / ".cache" / "slm").expanduser()


def digest(*parts: object) -> str:
    """A short hash that names a cache entry after everything that it was computed from."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(temporary_folder)` unless it is there already.

    The temporary folder is renamed when complete, so that a folder that exists is whole; processes that start together
    wait for the first one. Raises DataError if the disk is full or read-only; then nothing but the temporary folder is
    removed.
    """
    if folder.is_dir():
        return folder
    with disk_errors(folder), locked(folder):
        if folder.is_dir():
            return folder
        # Holding the lock, nobody else can be writing: what lies here was left by a process that was killed.
        for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(leftover)
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        try:
            temporary.mkdir()
            build(temporary)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock named after `path`; the kernel frees it even if the process is killed."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full or unwritable disk into a DataError."""
    try:
        yield
    except OSError as error:
        advice = "point data.cache (or $SLM_CACHE) to another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"disk full while writing {folder}: free some space, or {advice}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(f"cannot write {folder} ({error.strerror}): {advice}") from error
        raise
