"""JAX's own cache of compiled programs, for this process."""

from __future__ import annotations

import jax


def keep_compiled(folder: str) -> None:
    """Keeps whatever is compiled from here on in `folder`, and reuses it. The folder is for one kind of CPU."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # by default it skips fast compiles
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
