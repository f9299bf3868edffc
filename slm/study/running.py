"""Running the cells of a study: what is done is not done again, what can train together does, what fails is a row."""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from slm.config import Experiment, from_json, longest_sequence, override, to_json
from slm.data.cache import locked
from slm.errors import ConfigError, DivergenceError, SlmError
from slm.models.counts import flops_per_token
from slm.study.cells import RESULT, Cell, measured, own_mechanisms
from slm.study.packing import packs, train_pack
from slm.study.watching import POLL, Said, watched
from slm.training.signals import StopRequest

MOST = 16
"""Runs in one program on one device, unless told otherwise."""
LONG = 7e11
"""FLOPs of a run from which on a CPU it trains alone, unless told otherwise: in a program with others it takes about a
quarter longer, and saves only its compilation (benchmarks/README.md)."""
CORES = "SLM_STUDY_CORES"
"""Environment variable with the cores of a worker."""


class Stopped(Exception):
    """A study was told to stop. What is done is kept."""


def run_cells(cells: Sequence[Cell], processes: int = 0, pack: int | None = None, show: bool = True) -> list[list[int]]:
    """Trains the cells that have not ended. Divergences are kept as they are; failures are tried again.

    Args:
      cells: what to run.
      processes: 0: in this one. More: so many at a time, each with its own device where there are several; a process
        that dies takes no other with it.
      pack: most runs in one program; 1: none together; None: 16 on one device, more on several, and on a CPU short runs
        only.
      show: a line for each group of runs.

    Returns:
      The groups that were trained together, as numbers of `cells`.

    Raises Stopped on Ctrl-C or SIGTERM, after saving; another call goes on from there. ConfigError for processes that
    would not know a mechanism, since this program has added it to MIXERS.
    """
    if processes and (own := sorted({name for cell in cells for name in own_mechanisms(cell.config)})):
        raise ConfigError(
            f"processes = {processes}: other processes do not know {', '.join(own)}, which this program has added to "
            "slm.models.mixers.MIXERS; leave processes at 0, or make it a file of slm/models/mixers"
        )
    left = {}
    for cell in cells:
        if (cell.result() or {}).get("status") not in ("done", "diverged"):
            left.setdefault(cell.config.name, cell)
    todo = list(left.values())
    for cell in todo:
        (cell.folder / RESULT).unlink(missing_ok=True)  # a failure, which is tried again
    groups = [[todo[i] for i in group] for group in _packs([cell.config for cell in todo], pack)]
    with watched(todo, len(cells) - len(todo), show, packing_of(groups)) as said:
        if processes:
            _in_processes(groups, processes, said)
        else:
            with StopRequest() as stop:  # hears of what comes while a run ends, too late to stop that run
                for group in groups:
                    run_group(group, said)
                    if stop.signal is not None and group is not groups[-1]:
                        raise Stopped
    number = {cell.config.name: i for i, cell in reversed(list(enumerate(cells)))}
    return [[number[cell.config.name] for cell in group] for group in groups]


def packing_of(groups: Sequence[Sequence[Any]]) -> str:
    """In words: `2 programs of 16 runs, 1 of 4, 3 runs alone`."""
    sizes = Counter(len(group) for group in groups)
    alone = sizes.pop(1, 0)
    parts = []
    for size, count in sorted(sizes.items(), reverse=True):
        what = "" if parts else f" program{'s' * (count > 1)}"
        parts.append(f"{count}{what} of {size}" + ("" if parts else " runs"))
    return ", ".join([*parts, *[f"{alone} run{'s' * (alone > 1)} alone"] * bool(alone)])


def _packs(cfgs: Sequence[Experiment], pack: int | None) -> list[list[int]]:
    if pack is not None:
        return packs(cfgs, pack)
    groups = packs(cfgs, MOST * jax.local_device_count())
    if jax.default_backend() != "cpu":
        return groups
    return [
        part
        for group in groups
        for part in ([[i] for i in group] if len(group) > 1 and _is_long(cfgs[group[0]]) else [group])
    ]


def _is_long(cfg: Experiment) -> bool:
    from slm.data.tokenizers import planned_vocabulary

    vocabulary = cfg.model.vocab_size or planned_vocabulary(cfg.data.tokenizer, False) or 512
    model = dataclasses.replace(cfg.model, vocab_size=vocabulary, max_length=longest_sequence(cfg.data))
    tokens = cfg.train.steps * cfg.train.batch_size * cfg.data.sequence_length
    return flops_per_token(model, cfg.data.sequence_length)["train"] * tokens > LONG


def run_group(cells: Sequence[Cell], said: Said = lambda text: None) -> None:
    """Trains cells together in this process, and writes what came of each. Raises Stopped."""
    with contextlib.ExitStack() as stack:
        for cell in sorted(cells, key=lambda cell: cell.config.name):
            cell.folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(cell.folder))
        # Somebody else may have done it meanwhile.
        cells = [cell for cell in cells if (cell.result() or {}).get("status") not in ("done", "diverged")]
        if not cells:
            return
        stopped, failure = False, None
        try:
            stopped = _train(cells, time.time())
        except Exception as error:  # whatever a mechanism of one's own may raise; a study goes on with its other arms
            failure = _why(error)
        if failure is not None and len(cells) == 1:
            cells[0].finish("failed", error=failure)
    if failure is not None and len(cells) > 1:
        # Perhaps too large together; and one that fails must not take the others with it. By now the error, and with it
        # the arrays of its frames, is gone.
        for cell in cells:
            run_group([cell], said)
        return
    for cell in cells:
        if (result := cell.result()) is not None:
            said(_line(cell, result))
    if stopped:
        raise Stopped


def _train(cells: Sequence[Cell], begun: float) -> bool:
    """Returns whether it was told to stop."""
    from slm.training.loop import train

    packed = {"packed": len(cells)}
    if len(cells) > 1:
        outcomes = train_pack([_quiet(cell) for cell in cells], show=False)
        errors = [outcome.error for outcome in outcomes]
        finished = [outcome.run.finished for outcome in outcomes]
    else:
        try:
            errors, finished = [None], [train(_quiet(cells[0])).finished]
        except DivergenceError as error:
            errors, finished = [str(error)], [False]
    seconds = (time.time() - begun) / len(cells)
    for cell, error, done in zip(cells, errors, finished, strict=True):
        if error is not None:
            cell.finish("diverged", error=error, seconds=seconds, **packed)
        elif done:
            facts = measured(cell, len(cells))
            if lost := [name for name in ("bits_per_byte", "loss") if name in facts and facts[name] is None]:
                cell.finish("diverged", error=f"its last {lost[0]} is not a finite number", seconds=seconds, **packed)
            else:
                cell.finish("done", seconds=seconds, **packed, **facts)
    return not all(done or error is not None for done, error in zip(finished, errors, strict=True))


def _why(error: Exception) -> str:
    """In a line: what happened; and where, if it is not an error that says so itself."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if not isinstance(error, (SlmError, MemoryError, jax.errors.JaxRuntimeError)):
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{text[:400]} ({Path(last.filename).name}, line {last.lineno})"
    return text[:500]


def _quiet(cell: Cell) -> Any:
    return override(cell.config, {"log.console": False})


def _in_processes(groups: list[list[Cell]], processes: int, said: Said) -> None:
    stopping = threading.Event()
    running: list[subprocess.Popen] = []
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(processes):
        slots.put(slot)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool, _term_interrupts():

        def attempt(group: list[Cell]) -> str | None:
            """Trains them in a process of their own. Why that died, if it did."""
            if stopping.is_set():
                return None
            slot = slots.get()
            file = Path(folder) / f"{slot}.json"
            rows = [{"arm": c.arm, "seed": c.seed, "config": json.loads(to_json(c.config))} for c in group]
            file.write_text(json.dumps(rows))
            process = subprocess.Popen(
                [sys.executable, "-m", "slm.study.running", str(file), str(os.getpid())],
                env=_environment(slot, processes), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            running.append(process)
            if stopping.is_set():  # meanwhile
                process.terminate()
            _, errors = process.communicate()
            slots.put(slot)
            if process.returncode in (0, 130) or stopping.is_set():
                return None
            last = (errors.strip().splitlines() or ["nothing on stderr"])[-1]
            return f"its process ended with exit code {process.returncode}: {last}"[:500]

        def work(group: list[Cell]) -> None:
            why = attempt(group)
            left = [cell for cell in group if cell.result() is None]
            if why and len(group) > 1:  # perhaps too large together, for the kernel
                whys = [attempt([cell]) for cell in left]
            else:
                whys = [why] * len(left)
            for cell, one in zip(left, whys, strict=True):
                if one and cell.result() is None:
                    cell.finish("failed", error=one)
            for cell in group:
                if (result := cell.result()) is not None:
                    said(_line(cell, result))

        try:
            list(pool.map(work, groups))
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()  # saves first
            raise Stopped from None
    if any(cell.result() is None for group in groups for cell in group):
        raise Stopped


@contextlib.contextmanager
def _term_interrupts() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does; outside the main thread, where Python allows no handlers, what it did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _environment(slot: int, processes: int) -> dict[str, str]:
    """Of the worker in a slot: a GPU of its own where there are several, its share of the cores where there is none."""
    environment = dict(os.environ)
    gpus = [device.id for device in jax.local_devices() if device.platform == "gpu"]
    if visible := environment.get("CUDA_VISIBLE_DEVICES"):
        gpus = [visible.split(",")[number] for number in gpus]  # jax counts those that it may see
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpus[slot % len(gpus)])
        if processes > len(gpus):
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    elif hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[slot::processes] or [cores[slot % len(cores)]]
        environment[CORES] = ",".join(map(str, mine))
    return environment


def _line(cell: Cell, result: dict) -> str:
    name = f"{cell.arm}, seed {cell.seed}"
    if result["status"] != "done":
        return f"{name}: {result['status']}: {result['error']}"
    score = next((key for key in ("bits_per_byte", "loss") if key in result), None)
    return f"{name}: {score} {result[score]:.4f}, {result['seconds']:.0f} s"


def _end_after(parent: int) -> None:
    """Stops this process, which then saves, when the one that wanted its work is gone, and be it killed."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)


def _worker(file: str, parent: int) -> int:
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    if cores := os.environ.get(CORES):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    rows = json.loads(Path(file).read_text())
    cells = [Cell(row["arm"], row["seed"], from_json(json.dumps(row["config"]))) for row in rows]
    try:
        run_group(cells)
    except (Stopped, KeyboardInterrupt):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(_worker(sys.argv[1], int(sys.argv[2])))
