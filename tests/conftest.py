"""Tests run on eight pretended CPU devices, so that meshes are exercised everywhere."""

import gc
import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

MAPPINGS = 20_000
"""Linux gives a process 65,530 memory mappings. A compiled program takes three, and the whole suite far too many."""


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Forgets the compiled programs of earlier modules before a worker crashes for want of mappings."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()
