"""Checkpoints: saved in the background, committed by a rename, compared leaf by leaf with the model before restoring.

A step's folder holds `state` (the whole TrainState), `meta` (JSON: config, data fingerprint, version, metrics) and,
where the step was evaluated, `metrics`. Orbax writes it under a temporary name and renames it when complete, so a
process killed in the middle of a save leaves the older checkpoints as they were.
"""

import contextlib
import errno
import io
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from slm.config import CheckpointConfig
from slm.errors import CheckpointError
from slm.training.state import TrainState

CONTENT_ERRORS = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
"""Numbers of an OSError that say something about what is stored; the others are about reading it."""
TRANSIENT = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Status codes of XLA and tensorstore, which hide the operating system's errors behind them."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where the steps' folders are; created unless `read_only`.
      cfg: what to keep: the `keep` latest, and the best if `keep_best`.
      read_only: for inference: neither create the folder nor clear up after a killed save.

    Raises CheckpointError if a checkpoint's index is damaged or the folder cannot be created.
    """

    def __init__(self, folder: str | Path, cfg: CheckpointConfig, read_only: bool = False):
        self.folder = Path(folder).absolute()
        _quiet()
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(cfg.keep)]
        if cfg.keep_best:
            # Without the last argument a save that was not evaluated would never be deleted.
            keep.append(policies.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=_loss,  # orbax stores metrics only where this is set
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._check_metrics()
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"cannot use the checkpoint folder {self.folder}: {error}") from error

    def all_steps(self) -> list[int]:
        """Steps of complete checkpoints, and of the one being written, in ascending order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return max(self.all_steps(), default=None)

    def find(self, which: str | int) -> int:
        """The step that `which` means: "latest", "best" (of lowest validation loss), or a step's number.

        Raises CheckpointError, naming the steps there are, if there is no such checkpoint.
        """
        if which == "latest":
            return self._existing(None)
        if which == "best":
            self._existing(None)
            if (best := self._manager.best_step()) is None:
                raise CheckpointError(
                    f"no best checkpoint in {self.folder}: none was evaluated when it was saved; there are "
                    f"{self.all_steps()}"
                )
            return best
        try:
            return self._existing(int(which))
        except ValueError:
            raise CheckpointError(
                f"no checkpoint {which!r} in {self.folder}: name latest, best or one of the steps {self.all_steps()}"
            ) from None

    def save(self, state: TrainState, step: int, meta: dict, metrics: dict[str, float] | None = None) -> bool:
        """Copies `state` and writes it in the background; `state` may be donated as soon as this returns.

        Args:
          state: what to save.
          step: its number of updates.
          meta: stored beside it; plain JSON values.
          metrics: validation metrics of this very state; their `loss` decides which checkpoint is best.

        Returns:
          Whether it is being saved; False if there is a checkpoint of this step, which is left alone.

        Raises CheckpointError if this save, or the previous one in the background, failed (a full disk).
        """
        with self._writing(step):
            if step in self._manager.all_steps():
                return False
            metrics = {k: v for k, v in (metrics or {}).items() if isinstance(v, float) and math.isfinite(v)}
            return self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave(meta | {"step": step, "metrics": metrics}),
                ),
                metrics=metrics if "loss" in metrics else None,
                force=True,
            )

    def restore(self, target: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """The state of `step` (None: the latest), laid out as `target` says, and its `meta`.

        Args:
          target: tree of jax.ShapeDtypeStruct with shardings; the mesh need not be the one that saved.

        Raises CheckpointError if there is none, if any leaf is missing, extra or of another shape or dtype (nothing is
        restored then), or if the checkpoint is damaged.
        """
        step = self._existing(step)
        with self._reading(step):
            stored = self._manager.item_metadata(step).state.tree
        compare(stored, target, f"{self.folder / str(step)}")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        with self._reading(step):
            restored = self._manager.restore(step, args=args)
        return restored.state, restored.meta

    def read_meta(self, step: int | None = None) -> dict:
        """The `meta` of a checkpoint alone. Raises CheckpointError as `restore` does."""
        step = self._existing(step)
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore_parts(self, names: tuple[str, ...], step: int | None = None) -> dict[str, Any]:
        """Some fields of the TrainState, such as ("params", "ema"), as numpy trees; None where nothing was stored.

        Their shapes are the stored ones; compare them with the model's. Raises CheckpointError as `restore` does.
        """
        step = self._existing(step)
        with self._reading(step):
            stored = self._manager.item_metadata(step).state.tree
            part = {name: stored[name] for name in names}
            target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), part)
            as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), part)
            args = ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True)
            with ocp.PyTreeCheckpointer() as checkpointer:
                return checkpointer.restore(self.folder / str(step) / "state", args=args)

    def wait(self) -> None:
        """Returns when nothing is being written. Raises CheckpointError if that failed."""
        with self._writing(None):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, then ends orbax's threads, in this order even if the last save failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it repeats the error that wait() has raised
                self._manager.close()

    def _existing(self, step: int | None) -> int:
        self.wait()  # the latest may still be on its way to the disk
        steps = self.all_steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.folder}")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}: there are {steps}")
        return step

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = "no space left on the device" if "No space left" in str(error) else _first_line(error)
            which = "a checkpoint" if step is None else f"the checkpoint of step {step}, or the one before it,"
            raise CheckpointError(
                f"{which} could not be written to {self.folder}: {reason}. Checkpoints that were complete before are "
                "untouched: make room and run the same command again to resume from the latest"
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            with _silent_threads():
                yield
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        """Unless memory, rights or the device failed, the files are not as they were written."""
        folder = self.folder / str(step)
        if (
            isinstance(error, MemoryError)
            or (isinstance(error, OSError) and error.errno not in CONTENT_ERRORS)
            or any(status in str(error) for status in TRANSIENT)
        ):
            return CheckpointError(f"checkpoint {folder} could not be read: {_first_line(error)}; nothing was changed")
        older = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and int(p.name) < step]
        then = f"continue from step {max(older)}" if older else "start again from step 0: there is no older checkpoint"
        return CheckpointError(
            f"checkpoint {folder} is damaged ({_first_line(error)}). Nothing was changed. Move that folder away and "
            f"run the same command again to {then}"
        )

    def _check_metrics(self) -> None:
        """Orbax reads the metrics of all steps when it opens a folder and would fail there without naming the step."""
        for file in self.folder.glob("*/metrics/metrics"):
            try:
                json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise self._unreadable(int(file.parent.parent.name), error) from error


def compare(stored: Any, target: Any, where: str) -> None:
    """Raises CheckpointError, naming the first differing leaves, unless both trees have equal paths, shapes and dtypes.

    Orbax alone would load the first layers of a deeper checkpoint into a shallower model without a word
    (google/orbax issue 2972).
    """
    have, want = _leaves(stored), _leaves(target)
    differences = [f"{path} is missing" for path in want if path not in have]
    differences += [f"{path} has no place in the model" for path in have if path not in want]
    differences += [
        f"{path} is {have[path][0]} {have[path][1]}, the model wants {want[path][0]} {want[path][1]}"
        for path in want
        if path in have and have[path] != want[path]
    ]
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(
            f"checkpoint {where} does not fit this model: {'; '.join(differences[:3])}{more}. Nothing was restored. "
            "Use the config it was made with, or another --name"
        )


def _leaves(tree: Any) -> dict[str, tuple]:
    """Path to (shape, dtype). Orbax stores tuples by index and named fields by name, which is how jax spells paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _loss(metrics: dict) -> float:
    return metrics["loss"]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:120]


def _quiet() -> None:
    """Orbax reports each step of a save through absl, and each failure as a traceback besides the exception."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("absl").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _silent_threads() -> Iterator[None]:
    """Keeps the tracebacks of tensorstore's threads off the terminal when a read fails.

    The first failing array closes orbax's event loop; the callbacks of the others then print "Event loop is closed"
    one by one, a moment after the exception that matters has reached the caller. Tasks that failed too are reported
    whenever the collector finds them, by asyncio's logger: it stays silent about such tasks from then on.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        except Exception:
            time.sleep(0.3)
            logging.getLogger("asyncio").addFilter(_is_no_forgotten_task)
            raise


def _is_no_forgotten_task(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Task exception was never retrieved")
