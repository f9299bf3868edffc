"""Workers that take turns: `serve` inside a worker process, `Worker` in the process that compares them.

Every competitor lives in a process of its own and stays warm; the parent lets one run at a time, A B C A B C, so that
all of them see the same moods of the machine.
"""

import json
import resource
import subprocess
import sys
import time


def serve(prepared: dict, turn) -> None:
    """Say that we are ready, then run `turn()` and report its wall and processor seconds whenever asked."""
    print(json.dumps(prepared), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        extra = turn() or {}
        usage = resource.getrusage(resource.RUSAGE_SELF)
        took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(took | {"peak_mb": usage.ru_maxrss / 1024} | extra), flush=True)


class Worker:
    """A worker process; `ask()` gives it one turn."""

    def __init__(self, name: str, command: list[str], env: dict | None = None):
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.prepared = self._answer()
        self.turns: list[dict] = []

    def ask(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.turns.append(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} stopped with exit code {self.process.wait()}")
