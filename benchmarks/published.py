"""Published measurements of RPA v3, and what to compile to walk each of them.

Sources: `paper` is arXiv 2604.15464, tables 4 to 12 (TPU7x, both TensorCores; kernel only); `flywheel` is flywheel-tpu's
benchmark page for v7x (one TensorCore, jax 0.11.0, libtpu 0.0.44; kernel only), whose prefill figures are TFLOP/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from rpa_v3 import SMALL, SMALL_MIXED, Config, Tiles


@dataclass(frozen=True)
class Point:
    """One measurement. configs: the compiles to try, the best of which counts where the tiles are not known.

    kv_lens and q_lens are those of one TensorCore. fit: whether the constants are fitted to it.
    """

    source: str
    label: str
    case: str
    seconds: float
    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    configs: tuple[Config, ...]
    tiles_known: bool
    fit: bool = False

    @property
    def target(self) -> str:
        return self.configs[0].target


def _prefill_config(q_heads: int, kv_heads: int, head_dim: int, page: int, tokens: int, tiles: Tiles) -> Config:
    pages = tokens // page
    return Config("tpu7x", q_heads, kv_heads, head_dim, page, tokens, 1, tokens, max(64, pages), SMALL, tiles)


def _decode_config(
    q_heads: int, kv_heads: int, head_dim: int, page: int, max_len: int, seqs: int, tiles: Tiles | None
) -> Config:
    pages, tokens = {128: 4096, 256: 2048}[page], seqs
    return Config("tpu7x", q_heads, kv_heads, head_dim, page, max_len, seqs, tokens, pages, tiles, SMALL_MIXED)


def _flywheel_prefill() -> list[Point]:
    # Context: TFLOP/s at 32:4 heads and its tiles, TFLOP/s at 32:32 heads (tiles 128, 256, 128, 256). A compile for
    # more tokens differs only in strides, up to 32,767 tokens of context: past that masks are wider.
    rows = {
        1024: (274, (256, 512, 256, 256), 1024, 130),
        2048: (354, (256, 512, 256, 512), 2048, 160),
        4096: (416, (256, 1024, 256, 512), 16384, 177),
        8192: (448, (256, 2048, 128, 512), 8192, 187),
        16384: (465, (256, 1024, 256, 512), 16384, 189),
        32768: (492, (256, 2048, 128, 512), 131072, 192),
        131072: (500, (256, 2048, 128, 512), 131072, 194),
    }
    points = []
    for heads, column in ((4, 0), (32, 3)):
        for tokens, row in rows.items():
            tiles, compiled = (row[1], row[2]) if heads == 4 else ((128, 256, 128, 256), 16384)
            if heads == 32 and tokens > 16384:
                compiled = 131072
            config = _prefill_config(32, heads, 256, 128, compiled, tiles)
            seconds = 2 * tokens**2 * 32 * 256 / (row[column] * 1e12)
            label = f"prefill {tokens // 1024}K, 32:{heads} heads, d256"
            points.append(
                Point("flywheel", label, "mixed", seconds, (tokens,), (tokens,), (config,), True, tokens <= 8192)
            )
    return points


def _flywheel_decode() -> list[Point]:
    tried = (None, (1, 4096, 1, 2048), (1, 2048, 1, 2048), (1, 2048, 1, 1024))
    gqa = tuple(_decode_config(32, 4, 256, 128, 16384, 256, tiles) for tiles in tried)
    mha = (Config("tpu7x", 32, 32, 256, 128, 16384, 128, 128, 16384, None, SMALL_MIXED),)
    rows = ((256, 4, 5.148e-3, gqa), (128, 4, 2.574e-3, gqa), (128, 32, 22.43e-3, mha))
    return [
        Point(
            "flywheel",
            f"decode {n} x 15K, 32:{kv} heads, d256",
            "decode",
            seconds,
            (15360,) * n,
            (1,) * n,
            configs,
            False,
        )
        for n, kv, seconds, configs in rows
    ]


def _paper_decode() -> list[Point]:
    microseconds = {
        128: (137, 169, 233, 363, 641, 1269, 2527),
        256: (168, 236, 360, 638, 1256, 2507, 5023),
    }
    tried: dict[int, tuple[Tiles, ...]] = {
        128: (
            (1, 512, 1, 512),
            (1, 1024, 1, 1024),
            (1, 2048, 1, 1024),
            (1, 2048, 1, 2048),
            (1, 4096, 1, 2048),
            (1, 4096, 1, 4096),
        ),
        256: ((1, 512, 1, 512), (1, 1024, 1, 1024), (1, 2048, 1, 1024), (1, 2048, 1, 2048)),
    }
    points = []
    for head_dim, times in microseconds.items():
        configs = tuple(
            Config("tpu7x", 32, 8, head_dim, 256, 32768, 64, 64, 2048, tiles, SMALL_MIXED) for tiles in tried[head_dim]
        )
        for i, time in enumerate(times):
            context = 512 << i
            # Each TensorCore has half of the 128 sequences.
            lens, ones = (context,) * 64, (1,) * 64
            label = f"decode 128 x {context}, 32:8 heads, d{head_dim}"
            # At 512 a sequence is one block or two, whatever the tiles, and the wait for it is all there is.
            points.append(Point("paper", label, "decode", time * 1e-6, lens, ones, configs, False, context == 512))
    return points


def _paper_prefill() -> list[Point]:
    microseconds = {128: (11, 31, 80, 246, 852, 3163), 256: (13, 35, 87, 261, 898, 3337)}
    points = []
    for head_dim, times in microseconds.items():
        # One sequence: each TensorCore has half of the heads.
        config = _prefill_config(16, 4, head_dim, 256, 16384, (256, 1024, 256, 512))
        for i, time in enumerate(times):
            tokens = 512 << i
            label = f"prefill {tokens}, 32:8 heads, d{head_dim}"
            points.append(Point("paper", label, "mixed", time * 1e-6, (tokens,), (tokens,), (config,), False))
    return points


POINTS = (*_flywheel_prefill(), *_flywheel_decode(), *_paper_decode(), *_paper_prefill())
