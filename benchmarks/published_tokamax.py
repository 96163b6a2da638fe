"""Measured times of tokamax's batched RPA on TPU7x, and what to compile to walk each of them.

Source: the package's autotuning data, `tokamax/data/autotuning/tpu7x/pallas_tpu_batched_rpa.json`. A time there is the median
of five runs of the whole jitted operation on one TensorCore, by the profiler's device times. The operation was jitted
without donation, so each run copies the whole cache; the stated peak memory, twice the cache, agrees. Lengths are not in
the data: full page tables are assumed, and that a batch has as many new tokens in each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

Blocks = tuple[int, int, int, int, int]
"""Queries fetched, queries computed, KV fetched and computed, sequences at once, and buffers."""


@dataclass(frozen=True)
class Shape:
    """One compile. decode and prefill: its blocks. `new` tokens in each of `seqs` sequences, which end at `context`."""

    q_heads: int
    kv_heads: int
    head_dim: int
    seqs: int
    new: int
    context: int
    decode: Blocks
    prefill: Blocks
    page_size: int = 256

    @property
    def request(self) -> dict[str, object]:
        """What benchmarks/peers/compile_experimental.py asks for."""
        return {
            "kernel": "tokamax",
            "target": "tpu7x",
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "page_size": self.page_size,
            "max_model_len": self.context,
            "max_seqs": self.seqs,
            "tokens": self.seqs * self.new,
            "pages": self.seqs * self.context // self.page_size,
            "blocks": {"decode": self.decode, "prefill": self.prefill},
            "sm_scale": 1.0,
            "donate": (),
        }

    @property
    def parameters(self) -> dict[int, list[int]]:
        """The call's int32 arguments by number; pages in order, as the package's own benchmarks have them."""
        decodes = self.seqs if self.new == 1 else 0
        return {
            4: [self.context] * self.seqs,
            5: list(range(self.seqs * self.context // self.page_size)),
            6: [i * self.new for i in range(self.seqs + 1)],
            7: [decodes, decodes, self.seqs],
        }


@dataclass(frozen=True)
class Point:
    """One measurement of the whole operation."""

    label: str
    seconds: float
    shape: Shape


def _point(
    heads: tuple[int, int, int], batch: tuple[int, int, int], config: tuple[int, int, int, int, int, int], us: int
) -> Point:
    """`config` as in the data: prefill_bq_sz, prefill_bq_c_sz, bkv_sz, num_buffers, decode_batch_size, prefill_batch_size."""
    seqs, new, context = batch
    queries, computed, keys, buffers, decode_seqs, prefill_seqs = config
    decode, prefill = (1, 1, keys, decode_seqs, buffers), (queries, computed, keys, prefill_seqs, buffers)
    what = f"decode {seqs} x {context}" if new == 1 else f"prefill {seqs} x {new} of {context}"
    label = f"{what}, {heads[0]}:{heads[1]} heads, d{heads[2]}"
    return Point(label, us * 1e-6, Shape(*heads, seqs, new, context, decode, prefill))


POINTS = (
    _point((32, 2, 256), (1, 1, 9216), (64, 64, 512, 3, 4, 1), 87),
    _point((32, 2, 256), (8, 1, 131072), (64, 64, 2048, 2, 4, 1), 2404),
    _point((32, 2, 256), (16, 1, 4096), (64, 64, 2048, 2, 4, 1), 214),
    _point((32, 2, 256), (64, 1, 4096), (64, 64, 2048, 2, 4, 1), 656),
    _point((8, 1, 256), (256, 1, 4096), (128, 64, 2048, 3, 4, 2), 1260),
    _point((2, 1, 128), (64, 1, 8192), (64, 64, 2048, 3, 4, 2), 371),
    _point((2, 1, 128), (1, 2048, 2048), (256, 64, 512, 2, 8, 2), 76),
    _point((32, 2, 256), (1, 1024, 1024), (256, 64, 512, 2, 4, 1), 195),
    _point((32, 2, 256), (1, 1024, 8192), (256, 64, 512, 2, 4, 1), 540),
    _point((32, 2, 256), (1, 2048, 2048), (256, 64, 512, 2, 8, 1), 317),
    _point((32, 2, 256), (1, 8192, 8192), (256, 64, 512, 2, 4, 1), 2200),
    _point((32, 2, 256), (2, 2048, 65536), (256, 64, 512, 2, 8, 1), 12899),
)
