"""What the engines of known_models.py and tests/oracle/check_gguf.py share: a job in, one line of JSON out."""

import json
import sys
import time
from pathlib import Path

import numpy as np


def job() -> dict:
    """The job, a JSON file that the command line names."""
    return json.loads(Path(sys.argv[1]).read_text())


def peak_mb() -> float:
    """Largest resident set of this process since it began; unlike getrusage's, it does not start with the parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def loaded(prepare, load, version) -> dict:
    """Times `load()`, after which every parameter has been read, once `prepare()` has imported everything."""
    start = time.perf_counter()
    prepare()
    imported = {"import_seconds": time.perf_counter() - start, "before_mb": peak_mb()}
    start = time.perf_counter()
    load()
    return imported | {"load_seconds": time.perf_counter() - start, "peak_mb": peak_mb(), "version": version()}


class Scores:
    """Sums of -log p of each row's tokens but the first, and logits of the first `keep` rows in a file."""

    def __init__(self, job: dict, vocab: int):
        self.tokens = np.load(job["tokens"])
        self.nll: list[float] = []
        self._keep, self._kept = job.get("keep", 0), None
        if self._keep:
            shape = (self._keep, self.tokens.shape[1], vocab)
            self._kept = np.lib.format.open_memmap(job["logits"], "w+", np.float32, shape)

    def add(self, logits_TxV: np.ndarray) -> None:
        row = len(self.nll)
        if row < self._keep:
            self._kept[row] = logits_TxV
        rest, targets = logits_TxV[:-1], self.tokens[row, 1:]
        top = rest.max(-1, keepdims=True)
        log_sum = np.log(np.exp(rest - top).sum(-1, dtype=np.float64)) + top[:, 0]
        self.nll.append(float((log_sum - rest[np.arange(len(rest)), targets]).sum()))

    def answer(self, **more) -> None:
        if self._kept is not None:
            self._kept.flush()
        print(json.dumps({"nll": self.nll, **more}), flush=True)
