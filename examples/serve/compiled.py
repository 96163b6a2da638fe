"""JAX's own cache of compiled programs, for this process."""

from __future__ import annotations

import jax


def keep_compiled(folder: str) -> None:
    """Keeps in `folder` whatever is compiled from here on, and takes it from there. It fits one kind of CPU."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # by default only what took a second
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
