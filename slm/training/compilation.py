"""Compiled programs are kept on disk, so that a second start of the same experiment begins at once."""

from pathlib import Path

import jax


def enable_compilation_cache(folder: Path) -> None:
    """Makes `folder` JAX's persistent cache, unless JAX_COMPILATION_CACHE_DIR or the program has chosen another.
    JAX_ENABLE_COMPILATION_CACHE=false turns caching off."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
