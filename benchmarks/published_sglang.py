"""Times that SGLang-JAX publishes for its attention kernels on one core, and what to compile to walk each of them.

Source: the CI baselines in `benchmark/kernels/flash_attention/bench_flashattention.py` of sgl-project/sglang-jax; `utils.py`
beside it makes the batches. Those of v6e were measured with its copy of RPA v3. Those of TPU7x are equal, to the last digit, to
the baselines of the revision before that copy, so they are of the kernel that it had until then, whose ancestor is in
tpu-inference 0.11.1.

Tiles of RPA v3 are inferred from the rule in that revision. Those of the earlier kernel are inferred from a later revision of
its tuned table, where all of these batches have blocks of 2048 tokens; one entry says 4096 (TPU7x, 4:2 heads, pages of 256),
which the measured time cannot be of.
"""

from __future__ import annotations

import functools

import jax
from published import Point
from rpa_v3 import SMALL, SMALL_MIXED, Config, Kernel, Tiles

_CACHE_TOKENS, _MAX_LEN = 600_000, 40_960
_SHAPES = ((4, 1), (4, 2), (8, 1), (8, 4))
_V3_BLOCKS = {(4, 1): 16384, (4, 2): 4096, (8, 1): 16384, (8, 4): 2048}
_V3_PREFILL: Tiles = (32, 1024, 32, 512)
_EARLY_BLOCK = 2048

# Microseconds, in the order of _SHAPES; of decode by (sequences, page).
_V3_DECODE = {
    (128, 256): (542.97, 287.88, 540.69, 420.54),
    (128, 128): (582.31, 325.92, 579.98, 554.49),
    (256, 256): (1076.22, 567.68, 1071.49),
    (256, 128): (1154.69, 644.74, 1150.03, 1100.96),
}
_V3_PREFILL_TIMES = {1024: (33.42, 57.67, 44.15, 83.53), 4096: (194.61, 344.18, 252.55, 506.54)}
_EARLY_DECODE = {
    "tpu7x": {(128, 256): (153.30, 207.26, 152.81, 314.00), (128, 128): (159.43, 226.24, 159.39, 331.83)},
    "v6e": {(128, 256): (168.98, 251.91, 168.71, 399.74), (128, 128): (232.92, 298.83, 237.47, 529.59)},
}
_FIT = ((128, 256, (4, 2)), (128, 128, (4, 2)))
"""Two points that DMAs bound, and that differ in the number of DMAs alone."""


@functools.cache
def decode_lens(seqs: int) -> tuple[int, ...]:
    """The lengths of the decode batches, the new token included."""
    return tuple((jax.random.randint(jax.random.PRNGKey(42), (seqs,), 1024, 2048) + 1).tolist())


def _pages(page: int) -> int:
    return -(-_CACHE_TOKENS // page)


def _decode(
    source: str, target: str, batch: tuple[int, int], shape: tuple[int, int], micros: float, block: int
) -> Point:
    seqs, page = batch
    tiles: Tiles = (1, block, 1, block)
    kernel: Kernel = "early" if source == "sglang-early" else "v3"
    config = Config(target, *shape, 128, page, _MAX_LEN, seqs, seqs, _pages(page), tiles, SMALL_MIXED, kernel=kernel)
    fit = source == "sglang" and (seqs, page, shape) in _FIT
    label = f"decode {seqs} x 1K to 2K, {shape[0]}:{shape[1]} heads, pages of {page}"
    return Point(source, label, "decode", micros * 1e-6, decode_lens(seqs), (1,) * seqs, (config,), False, fit)


def _prefill(tokens: int, shape: tuple[int, int], micros: float) -> Point:
    seqs = -(-tokens // 2048)
    lens = (min(tokens, 2048),) * seqs
    config = Config("v6e", *shape, 128, 128, _MAX_LEN, seqs, tokens, _pages(128), SMALL, _V3_PREFILL)
    label = f"prefill {tokens}, {shape[0]}:{shape[1]} heads, pages of 128"
    return Point("sglang", label, "mixed", micros * 1e-6, lens, lens, (config,), False)


def points() -> tuple[Point, ...]:
    """All of them. Imports JAX's random numbers, which make the batches."""
    found = []
    for batch, times in _V3_DECODE.items():
        for shape, micros in zip(_SHAPES, times, strict=False):  # one is not published
            found.append(_decode("sglang", "v6e", batch, shape, micros, _V3_BLOCKS[shape]))
    for tokens, times in _V3_PREFILL_TIMES.items():
        found += [_prefill(tokens, shape, micros) for shape, micros in zip(_SHAPES, times, strict=True)]
    for target, by_batch in _EARLY_DECODE.items():
        for batch, times in by_batch.items():
            for shape, micros in zip(_SHAPES, times, strict=True):
                found.append(_decode("sglang-early", target, batch, shape, micros, _EARLY_BLOCK))
    return tuple(found)
