"""The batches that all kernels are compared on: Llama 3 8B attention, the same lengths and pages for each of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from rpac.predict import Workload

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MAX_SEQS, MAX_MODEL_LEN, PREFILL_CHUNK = 64, 32768, 512
DECODE_TOKENS, PREFILL_TOKENS = 64, 2048
"""The token buckets: query rows of the compiled calls, padding included."""

RPA_V3 = ("RPA v3, default", "RPA v3, best")
# Target, page size, and the peers beside ours there; none named: all of them.
PLACES: dict[tuple[str, int], tuple[str, ...]] = {
    ("tpu7x", 128): (),
    ("tpu7x", 16): (),
    ("v6e", 128): (),
    ("v6e", 16): (),
    ("v5p", 128): RPA_V3,
    ("v5e", 128): RPA_V3,
}
RAGGED_SEED = 6000


@dataclass(frozen=True)
class Case:
    """A batch by its lengths; `kind` says what it is judged by: decode by MBU, the others by MFU."""

    kind: str
    workload: Workload

    @property
    def label(self) -> str:
        return self.workload.label

    @property
    def tokens(self) -> int:
        """The bucket that the new tokens are padded to."""
        return DECODE_TOKENS if self.kind == "decode" else PREFILL_TOKENS

    @property
    def longest(self) -> int:
        return max(self.workload.kv_lens)

    @property
    def longest_chunk(self) -> int:
        return max(self.workload.q_lens)


def ragged(seqs: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths in tokens, uniform between two bounds, the same on every run."""
    numbers = random.Random(RAGGED_SEED)
    return tuple(numbers.randint(shortest, longest) for _ in range(seqs))


def _decode(label: str, kv_lens: tuple[int, ...]) -> Case:
    return Case("decode", Workload(label, (1,) * len(kv_lens), kv_lens))


def _prefill(seqs: int, new: int, end: int) -> Case:
    return Case("prefill", Workload(f"prefill {seqs} x {new} of {end}", (new,) * seqs, (end,) * seqs))


CASES = (
    *(_decode(f"decode {MAX_SEQS} x {n}", (n,) * MAX_SEQS) for n in (256, 1024, 2048, 4096, 8000, 32768)),
    _decode(f"decode {MAX_SEQS} x 100 to 6000", ragged(MAX_SEQS, 100, 6000)),
    _prefill(1, 2048, 2048),
    _prefill(1, 2048, 8000),
    _prefill(4, 512, 4096),
    Case("mixed", Workload("mixed 32 x 2048 and 2 x 512 of 2048", (1,) * 32 + (512,) * 2, (2048,) * 34)),
)
