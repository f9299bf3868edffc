"""The safetensors files of a Hugging Face folder: read one tensor at a time, and never trusted.

safetensors checks each file's header (size, offsets, dtypes). What is checked here is that the index names files of
this folder only, and that tensors have the shapes that the config promises before anything is allocated.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slm.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_, "I8": np.int8,
}  # fmt: skip
LARGEST_JSON = 64 * 2**20


class TensorFolder:
    """The tensors of a folder by name; files stay closed until a tensor is read.

    Raises CheckpointError for a folder without safetensors, a damaged or hostile file, and a damaged index.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._stack = contextlib.ExitStack()
        self._file_of: dict[str, Path] = {}
        index = folder / INDEX
        if index.is_file():
            promised = self._read_index(index)
            files = sorted(set(promised.values()))
        elif (folder / SINGLE).is_file():
            promised, files = None, [SINGLE]
        else:
            raise CheckpointError(_nothing_here(folder))
        for name in files:
            for tensor in self._file(folder / name).keys():  # noqa: SIM118 (not a dict)
                if tensor in self._file_of:
                    raise CheckpointError(f"{folder}: tensor '{tensor}' is in two files")
                self._file_of[tensor] = folder / name
        if promised is not None and (missing := sorted(set(promised) - set(self._file_of))):
            raise CheckpointError(f"{index} promises '{missing[0]}', which {promised[missing[0]]} does not hold")

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(x, str) for x in weight_map.values())
        ):
            raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
        for name in set(weight_map.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index} names {name!r}: only .safetensors files of the same folder are read")
            if not (index.parent / name).is_file():
                raise CheckpointError(f"{index.parent} lacks {name}, which {INDEX} names: fetch it")
        return weight_map

    def _file(self, path: Path):
        from safetensors import SafetensorError, safe_open

        if path not in self._open:
            try:
                self._open[path] = self._stack.enter_context(safe_open(str(path), framework="numpy"))
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
        return self._open[path]

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Raises CheckpointError for a dtype that no model here has."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise CheckpointError(f"tensor '{name}' of {self._file_of[name]} has dtype {stored}: not supported")
        return np.dtype(DTYPES[stored])

    def _slice(self, name: str):
        return self._file(self._file_of[name]).get_slice(name)

    def read(self, name: str) -> np.ndarray:
        """The tensor, in its stored dtype."""
        self.dtype(name)
        return self._file(self._file_of[name]).get_tensor(name)

    def close(self) -> None:
        self._stack.close()
        self._open.clear()

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if it is missing, damaged, absurdly large or no object."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} is larger than {LARGEST_JSON >> 20} MB: not a settings file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Writes tensors, in order, as one file or, beyond `shard_bytes`, as numbered ones with an index.

    One shard is in memory at a time. What an earlier save left in the folder is replaced.
    """
    from safetensors.numpy import save_file

    for old in [*folder.glob("model*.safetensors"), *folder.glob(INDEX)]:
        old.unlink()
    written, names = [], {}
    for number, shard in enumerate(_shards(tensors, shard_bytes)):
        path = folder / f"model-{number + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        written.append(path)
        names |= {name: (number, array.nbytes) for name, array in shard.items()}
    if len(written) == 1:
        written[0].rename(folder / SINGLE)
        return
    final = [f"model-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
    for path, name in zip(written, final):
        path.rename(folder / name)
    weight_map = {name: final[number] for name, (number, _) in names.items()}
    total = sum(size for _, size in names.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    (folder / INDEX).write_text(text)


def _shards(tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> Iterator[dict[str, np.ndarray]]:
    shard, size = {}, 0
    for name, array in tensors:
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = np.ascontiguousarray(array)
        size += array.nbytes
    yield shard


def _nothing_here(folder: Path) -> str:
    unsafe = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
    if unsafe:
        return (
            f"{folder} has {unsafe[0]} but no {SINGLE}: pickled weights can run code and are not read; convert them "
            "where you trust them, with transformers: AutoModel.from_pretrained(...).save_pretrained(FOLDER)"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}"
