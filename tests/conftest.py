"""Tests run on eight pretended CPU devices, so that meshes are exercised everywhere; what one of them has compiled,
no other compiles again, nor the processes that tests start, nor the next run of the tests, in whatever checkout."""

import gc
import os
import shutil
from pathlib import Path

os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(os.environ.get("SLM_CACHE") or os.path.expanduser("~/.cache/slm"), "tests"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

PROGRAMS = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
MANY = 2e9
"""Bytes of programs, most of them of code that has changed since, from which on a run of the tests begins anew."""
MAPPINGS = 20_000
"""Linux gives a process 65,530 memory mappings. A compiled program takes three, and the whole suite far too many."""


def pytest_configure(config):
    ours = PROGRAMS.name == "tests" and not hasattr(config, "workerinput")
    if ours and sum(file.stat().st_size for file in PROGRAMS.glob("*")) > MANY:
        shutil.rmtree(PROGRAMS)


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Forgets the compiled programs of earlier modules before a worker crashes for want of mappings."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()
