"""What `slm.save_onnx` wrote, run by ONNX Runtime: needs numpy and onnxruntime only, to copy where slm is not."""

import importlib.util
import json
from pathlib import Path

import numpy as np

from slm.errors import CheckpointError, ConfigError

SETTINGS = "settings.json"
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int32)": "int32", "tensor(bool)": "bool"}


class Exported:
    """A folder of `slm.save_onnx`, ready to run.

    Raises CheckpointError for a folder that is damaged, ConfigError where onnxruntime is missing or an array has not
    the exported shape.
    """

    def __init__(self, folder: str | Path):
        if not importlib.util.find_spec("onnxruntime"):
            raise ConfigError("exported models run in the package onnxruntime: pip install onnxruntime")
        import onnxruntime

        folder = Path(folder)
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 4
        try:
            self.settings = json.loads((folder / SETTINGS).read_text())
            self._sessions = {}
            for name, signature in self.settings["functions"].items():
                session = onnxruntime.InferenceSession(folder / f"{name}.onnx", quiet, ["CPUExecutionProvider"])
                found = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
                for side, values in found.items():
                    has = {value.name: [TYPES.get(value.type), value.shape] for value in values}
                    if has != signature[side]:
                        raise ValueError(f"{name}.onnx has other {side} than {SETTINGS} says")
                self._sessions[name] = session
        except Exception as error:  # several formats, each with errors of its own
            raise CheckpointError(f"{folder} is no exported model: {type(error).__name__}: {error}") from error

    def run(self, function: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named arrays to the named results of `forward`, `start` or `decode`."""
        if function not in self._sessions:
            raise ConfigError(f"no {function} was exported, only {', '.join(self._sessions)}")
        asked = self.settings["functions"][function]
        if arrays.keys() != asked["inputs"].keys():
            raise ConfigError(f"{function} takes {', '.join(asked['inputs'])}, not {', '.join(arrays)}")
        given = {}
        for name, (dtype, shape) in asked["inputs"].items():
            given[name] = np.asarray(arrays[name], dtype)
            if list(given[name].shape) != shape:
                raise ConfigError(f"{name} has shape {given[name].shape}: this model was exported for {tuple(shape)}")
        return dict(zip(asked["outputs"], self._sessions[function].run(list(asked["outputs"]), given)))

    def forward(self, tokens, mask=None, token_types=None) -> np.ndarray:
        """(B, T) ids[, a mask of padding, and types, of encoders] to logits (B, T, V), or what the head answers."""
        arrays, takes = {"tokens": np.asarray(tokens)}, self.settings["functions"]["forward"]["inputs"]
        if "mask" in takes:
            arrays["mask"] = np.ones_like(arrays["tokens"]) if mask is None else mask
        if "token_types" in takes:
            arrays["token_types"] = np.zeros_like(arrays["tokens"]) if token_types is None else token_types
        (out,) = self.run("forward", arrays).values()
        return out

    def start(self) -> dict[str, np.ndarray]:
        """An empty cache."""
        return self.run("start", {})

    def decode(self, cache: dict[str, np.ndarray], tokens, positions) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """One token a row, (B,) ids at (B,) positions: logits (B, V) and the cache after it."""
        out = self.run("decode", {"tokens": tokens, "positions": positions} | cache)
        return out.pop("logits"), {name.removeprefix("new_"): value for name, value in out.items()}

    def generate(self, tokens, count: int) -> np.ndarray:
        """(B, T) ids of prompts to the (B, count) likeliest ids that follow, one after the other."""
        tokens = np.asarray(tokens, np.int32)
        prompt, longest = tokens.shape[1], self.settings["length"]
        if prompt < 1 or prompt + count > longest + 1:
            raise ConfigError(f"{prompt} tokens and {count} more: the exported cache holds {longest}; shorten them")
        cache, found = self.start(), []
        for at in range(prompt + count - 1):
            now = tokens[:, at] if at < prompt else found[-1]
            logits, cache = self.decode(cache, now, np.full(len(now), at))
            if at >= prompt - 1:
                found.append(logits.argmax(-1).astype(np.int32))
        return np.stack(found, 1) if found else tokens[:, :0]
