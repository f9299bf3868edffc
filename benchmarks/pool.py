"""Many small runs on the cores of this machine: one process a core, results kept as they come, no job done twice."""

import json
import os
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import date
from pathlib import Path


def run_jobs(script: str, jobs: list[dict], results: Path, cores: int | None = None, extra: Sequence[str] = ()):
    """Runs `python SCRIPT --job JSON EXTRA` for each job whose result is not in `results` yet; returns all rows.

    A worker prints its result, a JSON object, as its last line. A row is {"job": ..., "result": ...}.
    """
    record = json.loads(results.read_text()) if results.exists() else {"rows": []}
    done = [row["job"] for row in record["rows"]]
    waiting, lock = queue.Queue(), threading.Lock()
    for job in jobs:
        if job not in done:
            waiting.put(job)
    total = waiting.qsize()

    def work(core: int) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            command = [sys.executable, script, "--job", json.dumps(job), *extra]
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
            pin = lambda core=core: os.sched_setaffinity(0, {core})  # noqa: E731
            answer = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=pin)
            lines = answer.stdout.strip().splitlines()
            with lock:
                if answer.returncode or not lines:
                    print(f"failed ({answer.returncode}): {job}\n{answer.stderr[-2000:]}", flush=True)
                    continue
                record["rows"].append({"job": job, "result": json.loads(lines[-1])})
                record.update(date=str(date.today()), machine=machine())
                results.write_text(json.dumps(record, indent=1) + "\n")
                print(f"{total - waiting.qsize()}/{total} {job} {summary(record['rows'][-1]['result'])}", flush=True)

    threads = [threading.Thread(target=work, args=(core,)) for core in range(cores or os.cpu_count())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [row for row in record["rows"] if row["job"] in jobs]


def summary(result: dict) -> dict:
    return {name: round(value, 4) for name, value in result.items() if isinstance(value, (int, float))}


def machine() -> dict:
    import jax

    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__,
            "python": platform.python_version()}  # fmt: skip
