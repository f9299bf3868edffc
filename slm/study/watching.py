"""What a person sees of a study that runs: a line for each run that ends, and on a terminal one live line for all."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from slm.study.cells import Cell
from slm.training.progress import make_console
from slm.training.run import METRICS

Said = Callable[[str], None]
POLL = 1.0
"""Seconds between looks at what other processes do."""


@contextlib.contextmanager
def watched(cells: Sequence[Cell], done: int, show: bool, packing: str = "") -> Iterator[Said]:
    """Yields a function that says that a cell has ended, with how many are left and for how long.

    Args:
      cells: that are to run.
      done: how many more are done already.
      show: False: says nothing.
      packing: how they will run, in words.
    """
    if not show or not cells:
        yield lambda text: None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    console = make_console(True)
    if done:
        console.print(f"{done} of {done + len(cells)} runs are done already", soft_wrap=True)
    if packing:
        console.print(f"to train: {packing}", soft_wrap=True)
    start, before, ended = time.time(), _steps(cells), 0
    total = sum(cell.config.train.steps for cell in cells)

    def left() -> str:
        made = _steps(cells) - before
        rest = total - before - made
        return _time((time.time() - start) / made * rest) + " left" if made > 0 and rest else ""

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[numbers]}"))
    bar = Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal)
    task = bar.add_task("study", total=total, completed=before, numbers="")
    over = threading.Event()

    def look() -> None:
        while not over.wait(POLL):
            steps = _steps(cells)
            bar.update(task, completed=steps, numbers=f"{ended}/{len(cells)} runs  step {steps:,}/{total:,}  {left()}")

    def said(text: str) -> None:
        nonlocal ended
        ended += 1
        rest = left() if ended < len(cells) else ""
        console.print(f"[{ended}/{len(cells)}] {text}{rest and '; ' + rest}", soft_wrap=True, markup=False)

    with bar:
        thread = threading.Thread(target=look, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield said
        finally:
            over.set()


def _steps(cells: Sequence[Cell]) -> int:
    """Steps that all of these have made; of one that has ended, all that it was to make."""
    return sum(
        cell.config.train.steps if cell.result() else min(_step(cell), cell.config.train.steps) for cell in cells
    )


def _step(cell: Cell) -> int:
    """The last step that it wrote a row of."""
    try:
        with open(cell.folder / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
