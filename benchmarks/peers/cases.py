"""The batches that all kernels are compared on: the same lengths and pages for each of them, for the attention of one device."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from rpac.predict import Workload

MAX_SEQS, MAX_MODEL_LEN, PREFILL_CHUNK = 64, 32768, 512
DECODE_TOKENS, PREFILL_TOKENS = 64, 2048
"""The token buckets: query rows of the compiled calls, padding included."""

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
        return max(DECODE_TOKENS, self.max_seqs) if self.kind == "decode" else PREFILL_TOKENS

    @property
    def max_seqs(self) -> int:
        """Sequences that the call is compiled for."""
        return max(MAX_SEQS, len(self.workload.q_lens))

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

# fmt: off
SGLANG_LENS: Final = (
    1221, 1043, 1208, 1218, 1678, 1388, 1410, 1320, 1031, 1283, 1577, 2035, 1434, 1500, 1997, 1811, 1612, 1923,
    1860, 1544, 1591, 1676, 1293, 1732, 1133, 1554, 2033, 1564, 1309, 1336, 1286, 1701, 1494, 1071, 1076, 1045,
    1839, 1971, 1874, 2030, 1800, 1605, 1688, 1406, 1914, 1217, 1341, 1701, 1828, 1550, 1685, 1756, 2003, 1396,
    2041, 1464, 1036, 1363, 1884, 1978, 1818, 1799, 1825, 1673, 1668, 1402, 1333, 1633, 1603, 1210, 1197, 1862,
    2036, 1070, 1701, 1533, 1327, 1963, 1586, 1122, 1560, 1745, 1462, 1837, 1458, 1849, 1881, 1081, 1449, 2047,
    1120, 1686, 1855, 1721, 1172, 2010, 2040, 1504, 1211, 2018, 1842, 1373, 1318, 1573, 1152, 1485, 1599, 1571,
    1690, 1178, 1916, 2048, 1316, 1725, 1346, 1636, 1414, 1289, 1887, 1636, 1668, 1857, 1283, 1092, 1379, 1237,
    1231, 1927,
)
# fmt: on
"""The batch of SGLang-JAX's benchmark of decode: jax.random.randint(jax.random.PRNGKey(42), (128,), 1024, 2048) + 1."""
SGLANG_CASE: Final = _decode("decode 128 x 1025 to 2048", SGLANG_LENS)

Place = tuple[str, int]
"""Target and page size."""

RPA_V3 = ("RPA v3, default", "RPA v3, best")
ALL_PEERS = (*RPA_V3, "JAX v2", "flywheel-tpu", "batched_rpa", "stacked_rpa", "tokamax")
BOTH_LAYOUTS = ("rpac", "rpac, separate")
SHARD_CASES = (
    *(_decode(f"decode {MAX_SEQS} x {n}", (n,) * MAX_SEQS) for n in (1024, 4096)),
    _prefill(4, 512, 4096),
)


@dataclass(frozen=True)
class Heads:
    """The attention that one device computes, and who is compared on it where.

    label: how `--heads` and the document name it. places: target and page size -> the peers beside ours. rope_dim: of latent
    attention, whose `head_dim` is the rank of K and V.
    """

    label: str
    about: str
    q_heads: int
    kv_heads: int
    head_dim: int
    places: Mapping[Place, tuple[str, ...]]
    cases: tuple[Case, ...] = SHARD_CASES
    ours: tuple[str, ...] = BOTH_LAYOUTS
    kv_dtype: str = "bfloat16"
    sliding_window: int | None = None
    sinks: bool = False
    rope_dim: int | None = None

    @property
    def kv_bytes(self) -> int:
        return 2 if self.kv_dtype == "bfloat16" else 1

    def model(self) -> str:
        """The lines under `model:` of a spec."""
        lines = [f"q_heads: {self.q_heads}", "q_dtype: bfloat16", f"kv_dtype: {self.kv_dtype}"]
        if self.rope_dim is None:
            lines += [f"kv_heads: {self.kv_heads}", f"head_dim: {self.head_dim}"]
        else:
            scale = (128 + self.rope_dim) ** -0.5  # of the heads before absorption, as in DeepSeek V3
            lines += [
                "attention: latent",
                f"kv_lora_rank: {self.head_dim}",
                f"rope_dim: {self.rope_dim}",
                f"sm_scale: {scale}",
            ]
        if self.kv_bytes == 1:
            lines += ["kv_scale: tensor", "quantize: caller"]  # as RPA v3 does it
        if self.sliding_window is not None:
            lines.append(f"sliding_window: {self.sliding_window}")
        if self.sinks:
            lines.append("sinks: true")
        return "\n".join(f"  {line}" for line in lines)


def _places(peers: tuple[str, ...], page_size: int = 128) -> dict[Place, tuple[str, ...]]:
    return {("tpu7x", page_size): peers, ("v6e", page_size): peers}


LLAMA_8B: Final = Heads(
    "32/8",
    "Llama 3 8B on one device",
    32,
    8,
    128,
    {
        ("tpu7x", 128): ALL_PEERS,
        ("tpu7x", 16): ALL_PEERS,
        ("v6e", 128): ALL_PEERS,
        ("v6e", 16): ALL_PEERS,
        ("v5p", 128): RPA_V3,
        ("v5e", 128): RPA_V3,
    },
    CASES,
    ("rpac", "rpac, separate", "rpac, fitted"),
)
SHARDS: Final = (
    Heads("8/1", "Llama 3 70B over 8 devices", 8, 1, 128, _places(RPA_V3), (*SHARD_CASES, SGLANG_CASE)),
    Heads("16/2", "Llama 3 70B over 4 devices", 16, 2, 128, _places(RPA_V3)),
    Heads("32/2 d256", "Qwen3.5, with head_dim 256", 32, 2, 256, _places(RPA_V3, 256)),
    Heads(
        "8/1 d64",
        "gpt-oss 120B over 8 devices, its full layers",
        8,
        1,
        64,
        _places(("RPA v3, head_dim 64",)),
        sinks=True,
    ),
    Heads(
        "8/1 d64 window",
        "gpt-oss 120B over 8 devices, its layers with a window of 128",
        8,
        1,
        64,
        _places(("RPA v3, head_dim 64",)),
        sliding_window=128,
        sinks=True,
    ),
    Heads(
        "8/1 float8",
        "Llama 3 70B over 8 devices, with a float8 cache",
        8,
        1,
        128,
        _places(RPA_V3),
        kv_dtype="float8_e4m3fn",
    ),
    Heads(
        "32/8 float8",
        "Llama 3 8B on one device, with a float8 cache",
        32,
        8,
        128,
        _places(RPA_V3),
        kv_dtype="float8_e4m3fn",
    ),
    Heads(
        "MLA 128",
        "DeepSeek V3 with data-parallel attention",
        128,
        1,
        512,
        _places(("MLA v2",)),
        SHARD_CASES[:2],
        ("rpac",),
        rope_dim=64,
    ),
    Heads(
        "MLA 16",
        "DeepSeek V3 over 8 devices",
        16,
        1,
        512,
        _places(("MLA v2",)),
        SHARD_CASES[:2],
        ("rpac",),
        rope_dim=64,
    ),
)
HEADS: Final = (LLAMA_8B, *SHARDS)


@dataclass(frozen=True)
class Measured:
    """A time that somebody measured of a peer on one of these batches, in seconds."""

    heads: str
    place: Place
    case: str
    peer: str
    seconds: float
    source: str


TOKAMAX: Final = (
    "the whole call, from the table of tuned tiles in tokamax 0.0.17; the lengths are not in the table, and full page tables "
    "are assumed"
)
SGLANG: Final = (
    "the kernel alone, in SGLang-JAX's benchmark with an earlier version of the kernel and jax 0.8.1; its tiles are not "
    "known"
)
MEASURED: Final = (
    Measured("32/2 d256", ("tpu7x", 256), f"decode {MAX_SEQS} x 4096", "tokamax batched RPA", 656e-6, TOKAMAX),
    Measured("8/1", ("tpu7x", 128), SGLANG_CASE.label, "RPA v3", 159.4e-6, SGLANG),
    Measured("8/1", ("v6e", 128), SGLANG_CASE.label, "RPA v3", 580.0e-6, SGLANG),
)
