"""Prints the errors that docs/batch-contract.md and docs/adapters.md show.

python refusals.py NAME...
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import rpac
from rpac.batch import Batch, Limits
from rpac.batch import validate as validate_batch
from rpac.spec import load_spec

TINY = "specs/tiny.yaml"
BUNDLE = Path("build/tiny.rpac")


def limits() -> Limits:
    return Limits.of(load_spec(TINY))


def sound() -> Batch:
    """A decode row, a prefill row and a mixed row."""
    return Batch.build(limits(), [1, 16, 5], [40, 0, 20], [[1, 4, 7], [2], [3, 9]])


def validated(**changes: Any) -> None:
    """The metadata of the sound batch, with some arrays replaced by what a function makes of them."""
    batch = sound()
    arrays = {name: getattr(batch, name).copy() for name in ("kv_lens", "page_indices", "cu_q_lens", "distribution")}
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    validate_batch(batch.limits, batch.tokens, **arrays)


def put(*places: tuple[int, int]) -> Callable[[Any], Any]:
    """Sets elements of an array, each by its index."""

    def change(array: Any) -> Any:
        for index, value in places:
            array[index] = value
        return array

    return change


def engine() -> rpac.Engine:
    """The tiny spec's programs for this machine's CPU, built where they are not there yet."""
    if not BUNDLE.exists():
        command = [sys.executable, "-m", "rpac.cli", "build", TINY, "--target", "cpu"]
        subprocess.run(command, check=True, capture_output=True)
    return rpac.load(BUNDLE, target="cpu")


def call(cache: str = "") -> None:
    """A call of the engine with a cache that is of another dtype, or that was donated."""
    import jax.numpy as jnp

    one, batch = engine(), sound()
    taken = {dims.name: dims for dims in one.programs[rpac.Variant("mixed", 32)].args}
    arrays = {
        name: jnp.zeros(taken[name].shape, taken[name].dtype) for name in ("queries", "keys", "values", "kv_cache")
    }
    if cache == "wrong dtype":
        arrays["kv_cache"] = arrays["kv_cache"].astype("float32")
    if cache == "donated":
        arrays["kv_cache"].delete()
    one(*arrays.values(), *batch.metadata)


def adapter(pages: int = 128, page_size: int = 16, **options: Any) -> None:
    """A call of the adapter for tpu-inference's kernel."""
    import jax.numpy as jnp

    from rpac.adapters import tpu_inference

    one, batch = engine(), sound()
    taken = {dims.name: dims for dims in one.programs[rpac.Variant("mixed", 32)].args}
    arrays = {name: jnp.zeros(taken[name].shape, taken[name].dtype) for name in ("queries", "keys", "values")}
    cache = jnp.zeros((pages, page_size, *taken["kv_cache"].shape[2:]), taken["kv_cache"].dtype)
    attention = tpu_inference.ragged_paged_attention(one)
    attention(*arrays.values(), cache, *batch.metadata, sm_scale=one.model.sm_scale, **options)


CASES: dict[str, Callable[[], object]] = {
    "distribution": lambda: validated(distribution=put((0, 3))),
    "decode row": lambda: validated(distribution=put((0, 2))),
    "prefill row": lambda: validated(distribution=put((1, 3))),
    "empty row": lambda: validated(cu_q_lens=put((2, 1))),
    "short": lambda: validated(kv_lens=put((2, 4))),
    "long": lambda: validated(kv_lens=put((0, 600))),
    "page id": lambda: validated(page_indices=put((1, 128))),
    "page twice": lambda: validated(page_indices=put((1, 1))),
    "page shared": lambda: validated(page_indices=put((65, 1))),
    "dtype": lambda: validated(kv_lens=lambda array: array.astype(np.int64)),
    "shape": lambda: validated(page_indices=lambda array: array[:-1]),
    "cache": lambda: call("wrong dtype"),
    "donated": lambda: call("donated"),
    "bucket": lambda: validate_batch(limits(), 24, *sound().metadata),
    "tokens": lambda: Batch.build(limits(), [40], [0], [[0, 1, 2]]),
    "sequences": lambda: Batch.build(limits(), [1] * 5, [0] * 5, [[page] for page in range(5)]),
    "table": lambda: Batch.build(limits(), [1], [40], [[1, 4]]),
    "window": lambda: adapter(sliding_window=4096),
    "sizes": lambda: adapter(pages=64, page_size=32),
}


def main(names: list[str]) -> None:
    said = []
    for name in names:
        try:
            CASES[name]()
        except rpac.RpacError as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            sys.exit(f"{name}: nothing was refused")
    print("\n\n".join(said))


if __name__ == "__main__":
    main(sys.argv[1:])
