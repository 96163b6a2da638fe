"""The peers: what to compile for a batch, in which environment, and how its metadata become the call's arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peers.cases import MAX_MODEL_LEN, Case, Heads, Place
from peers.environment import Environment
from rpac.batch import Batch

Parameters = dict[int, list[int]]
Tiles = tuple[int, int, int, int]


@dataclass(frozen=True)
class Compile:
    """One compiled call: a script of this folder, the environment that it runs in, and its request.

    follow: its kernels take scalars that it computes, which the script computes from those of a batch.
    """

    choice: str
    script: str
    environment: Environment
    request: dict[str, Any]
    follow: bool = False


@dataclass(frozen=True)
class Ours:
    """A way to use rpac. `fitted`: with a spec for the batch, whose `prefill_chunk` is the batch's."""

    name: str
    about: str
    kv_layout: str
    fitted: bool = False


OURS = (
    Ours(
        "rpac",
        "one spec for all batches, with `context_lens: [1024, 4096]` and `prefill_chunk: 512`, and RPA v3's interleaved cache "
        "layout. A chunk of 2048 tokens is not one of its prefill chunks, so its `mixed` program runs it.",
        "interleaved",
    ),
    Ours("rpac, separate", "the same with `kv_layout: separate`.", "separate"),
    Ours(
        "rpac, fitted",
        "also with `kv_layout: separate`. If a sequence has 2048 new tokens, its `prefill_chunk` is 2048, so its `prefill` "
        "program runs the chunk.",
        "separate",
        fitted=True,
    ),
)


@dataclass(frozen=True)
class Contender:
    """A peer. `compiles` gives the choices for a batch, of which the fastest counts, or the reason why there are none.

    `about` describes the peer in the document, and says what its figures include.
    """

    name: str
    about: str
    compiles: Callable[[Heads, Place, Case], tuple[Compile, ...] | str]
    parameters: Callable[[Batch, Case], Parameters]


def shapes(heads: Heads, place: Place, case: Case) -> dict[str, Any]:
    """The part of a request that is the same for all."""
    target, page_size = place
    return {
        "target": target,
        "q_heads": heads.q_heads,
        "kv_heads": heads.kv_heads,
        "head_dim": heads.head_dim,
        "kv_dtype": heads.kv_dtype,
        "page_size": page_size,
        "max_model_len": MAX_MODEL_LEN,
        "max_seqs": case.max_seqs,
        "tokens": case.tokens,
        "pages": case.max_seqs * MAX_MODEL_LEN // page_size,
    }


def contract_parameters(batch: Batch, case: Case) -> Parameters:
    """RPA v3's arguments: a prefill row counts as mixed, which its kernel runs it as where no chunk is fixed."""
    decodes, _, count = batch.distribution.tolist()
    return {
        4: batch.kv_lens.tolist(),
        5: batch.page_indices.tolist(),
        6: batch.cu_q_lens.tolist(),
        7: [decodes, decodes, count],
    }


# KV fetched and KV computed at once, in tokens.
V3_DECODE_TILES = ((4096, 2048), (2048, 2048), (2048, 1024), (1024, 1024), (512, 512))
# Queries fetched, KV fetched, queries computed, KV computed. On v6e the default is (256, 1024, 128, 512).
V3_MIXED_TILES: tuple[Tiles, ...] = ((256, 2048, 128, 512), (128, 1024, 128, 512), (256, 1024, 256, 512))
V3_IDLE_DECODE_TILES = (1, 2048, 1, 2048)  # where the batch is about the other kernel
V3_IDLE_MIXED_TILES = (16, 256, 16, 256)


def _v3(heads: Heads, place: Place, case: Case, choice: str, decode: Tiles | None, mixed: Tiles | None) -> Compile:
    request = {**shapes(heads, place, case), "decode_tiles": decode, "mixed_tiles": mixed}
    return Compile(choice, "compile_rpa_v3.py", "measured", request)


def v3_default(heads: Heads, place: Place, case: Case) -> tuple[Compile, ...]:
    return (_v3(heads, place, case, "default", None, None),)


def v3_sweep(heads: Heads, place: Place, case: Case) -> tuple[Compile, ...]:
    """The default and the sweep. A decode batch is about the decode tiles, all others about the mixed ones."""
    found = list(v3_default(heads, place, case))
    if case.kind == "decode":
        for fetched, computed in V3_DECODE_TILES:
            tiles = (1, fetched, 1, computed)
            found.append(_v3(heads, place, case, f"{fetched}, {computed}", tiles, V3_IDLE_MIXED_TILES))
    else:
        for mixed in V3_MIXED_TILES:
            name = ", ".join(map(str, mixed))
            found.append(_v3(heads, place, case, name, V3_IDLE_DECODE_TILES, mixed))
    return tuple(found)


# KV tokens and queries at once; the first is the kernel's own table.
HD64_DECODE_BLOCKS = ((None, None), (4096, 8), (2048, 8), (1024, 8))
HD64_MIXED_BLOCKS = ((None, None), (2048, 64), (1024, 128))


def hd64_sweep(heads: Heads, place: Place, case: Case) -> tuple[Compile, ...]:
    found = []
    for kv_block, q_block in HD64_DECODE_BLOCKS if case.kind == "decode" else HD64_MIXED_BLOCKS:
        blocks = {"kv_block": kv_block, "q_block": q_block, "sliding_window": heads.sliding_window}
        choice = "its table" if kv_block is None else f"{kv_block}, {q_block}"
        request = {**shapes(heads, place, case), **blocks}
        found.append(Compile(choice, "compile_rpa_v3_hd64.py", "measured", request, follow=True))
    return tuple(found)


# KV tokens at once, sequences at once.
MLA_BLOCKS = ((1024, 1), (2048, 1), (1024, 4), (512, 8))


def mla_sweep(heads: Heads, place: Place, case: Case) -> tuple[Compile, ...] | str:
    if case.kind != "decode":
        return "compared in decode only."
    found = []
    for kv_block, rows in MLA_BLOCKS:
        request = {**shapes(heads, place, case), "rope_dim": heads.rope_dim, "kv_block": kv_block, "rows": rows}
        found.append(Compile(f"{kv_block}, {rows}", "compile_mla.py", "measured", request, follow=True))
    return tuple(found)


def mla_parameters(batch: Batch, case: Case) -> Parameters:
    return {number + 1: values for number, values in contract_parameters(batch, case).items()}


# KV fetched and computed, and queries, at once; the first is the kernel's own table.
V2_DECODE_BLOCKS = ((None, None), (2048, 16), (1024, 16), (512, 16))
V2_MIXED_BLOCKS = ((None, None), (1024, 64), (512, 128), (1024, 128))
V2_VMEM_MIB = {"tpu7x": 60, "v6e": 100}


def v2_sweep(heads: Heads, place: Place, case: Case) -> tuple[Compile, ...]:
    found = []
    for kv_block, q_block in V2_DECODE_BLOCKS if case.kind == "decode" else V2_MIXED_BLOCKS:
        blocks = {"kv_block": kv_block, "q_block": q_block, "vmem_mib": V2_VMEM_MIB[place[0]]}
        request = {**shapes(heads, place, case), **blocks}
        choice = "its table" if kv_block is None else f"{kv_block}, {q_block}"
        found.append(Compile(choice, "compile_v2.py", "measured", request))
    return tuple(found)


def v2_parameters(batch: Batch, case: Case) -> Parameters:
    count = int(batch.distribution[2])
    return {
        2: batch.kv_lens.tolist(),
        3: batch.page_indices.tolist(),
        4: batch.cu_q_lens.tolist(),
        5: [count],
    }


FLYWHEEL_PAGES = 128  # it takes multiples of this
FLYWHEEL_Q_BLOCK = 1024  # what it chooses for 2048 tokens, on both targets
FLYWHEEL_ROWS = 16  # of a bfloat16 tile in HBM on TPU7x; 8 on v6e, which gives these batches the same blocks


def flywheel(heads: Heads, place: Place, case: Case) -> tuple[Compile, ...] | str:
    if place[1] % FLYWHEEL_PAGES:
        return f"supports only page sizes that are a multiple of {FLYWHEEL_PAGES} tokens."
    request = shapes(heads, place, case)
    if case.kind == "decode":
        return (Compile("decode call", "compile_flywheel.py", "measured", {**request, "q_block": None}),)
    # Its append kernel crashes the compiler of the other environment.
    return (Compile("packed call", "compile_flywheel.py", "pinned", {**request, "q_block": FLYWHEEL_Q_BLOCK}),)


def flywheel_parameters(batch: Batch, case: Case) -> Parameters:
    ends = batch.cu_q_lens.tolist()
    kv_lens = batch.kv_lens.tolist()
    cached = [kv - (end - start) for kv, start, end in zip(kv_lens, ends, ends[1:], strict=False)]
    found = {4: cached, 5: batch.page_indices.tolist(), 6: [int(batch.distribution[2])]}
    if case.kind == "decode":
        return {**found, 7: list(range(len(kv_lens)))}
    return {**found, 7: ends, 8: kv_lens, 9: flywheel_blocks_before(ends)}


def flywheel_blocks_before(ends: Sequence[int]) -> list[int]:
    """Blocks of queries before each sequence: it cuts each sequence's rows into blocks from a tile's edge on."""
    before = [0]
    for start, end in itertools.pairwise(ends):
        rows = end - start // FLYWHEEL_ROWS * FLYWHEEL_ROWS
        before.append(before[-1] + (-(-rows // FLYWHEEL_Q_BLOCK) if end > start else 0))
    return before


SCHEDULED_PLACE = ("tpu7x", 128)
# Of decode: KV tokens fetched and computed, sequences at once, buffers. Of the others: queries fetched, queries computed,
# and then the same. The first is the kernel's own choice.
Blocks = tuple[int, int, int, int, int]
SCHEDULED_DECODE: tuple[Blocks | None, ...] = (None, (1, 1, 1024, 4, 2))
SCHEDULED_PREFILL: tuple[Blocks | None, ...] = (None, (256, 64, 512, 1, 2))


def scheduled(
    kernel: str, where: Environment, sweeps: bool
) -> Callable[[Heads, Place, Case], tuple[Compile, ...] | str]:
    """A kernel of the design of batched_rpa. Compiled in one place only: each compile takes minutes."""

    def compiles(heads: Heads, place: Place, case: Case) -> tuple[Compile, ...] | str:
        if place != SCHEDULED_PLACE:
            return "is compared on one target and page size only, because each of its compiles takes minutes."
        found = []
        mode, choices = ("decode", SCHEDULED_DECODE) if case.kind == "decode" else ("prefill", SCHEDULED_PREFILL)
        for blocks in choices if sweeps else (None,):
            request: dict[str, Any] = {"kernel": kernel, **shapes(heads, place, case)}
            if blocks is not None:
                request["blocks"] = {mode: blocks}
            name = "its own" if blocks is None else ", ".join(map(str, blocks[2:] if mode == "decode" else blocks))
            found.append(Compile(name, "compile_experimental.py", where, request))
        return tuple(found)

    return compiles


SPILLS = (
    "Its schedule takes nearly all of SMEM, so the compiler spills scalars of its kernels to HBM. The kernels wait for a DMA at "
    "each spill and each reload, and that is most of the predicted time. No measurement confirms the time of such waits."
)

CONTENDERS = (
    Contender(
        "RPA v3, default",
        "the kernel of tpu-inference 0.32.0, with its own choice of tiles.",
        v3_default,
        contract_parameters,
    ),
    Contender(
        "RPA v3, best",
        f"the same kernel. For each batch, the best of its default and {len(V3_DECODE_TILES)} decode tiles (KV fetched, KV "
        f"computed) or {len(V3_MIXED_TILES)} mixed tiles (queries fetched, KV fetched, queries computed, KV computed).",
        v3_sweep,
        contract_parameters,
    ),
    Contender(
        "RPA v3, head_dim 64",
        "tpu-inference's own kernel for that size, which takes sinks and windows. For each batch, the best of the blocks in its "
        f"own table and {len(HD64_DECODE_BLOCKS) - 1} others for decode, {len(HD64_MIXED_BLOCKS) - 1} for the rest (KV tokens, "
        "queries).",
        hd64_sweep,
        contract_parameters,
    ),
    Contender(
        "MLA v2",
        f"tpu-inference's latent attention, decode only. For each batch, the best of {len(MLA_BLOCKS)} blocks (KV tokens, "
        "sequences at once); it has no default for a bfloat16 cache.",
        mla_sweep,
        mla_parameters,
    ),
    Contender(
        "JAX v2",
        "`jax.experimental.pallas.ops.tpu.ragged_paged_attention`. For each batch, the best of the blocks in its own table and "
        f"{len(V2_DECODE_BLOCKS) - 1} others (KV tokens, queries). It does not write the new tokens to the cache, so its "
        "figures do not include that.",
        v2_sweep,
        v2_parameters,
    ),
    Contender(
        "flywheel-tpu",
        "flywheel-tpu 0.3.0, with its own choice of blocks. Decode is its public call. For the other batches, its two kernels "
        "(append, attend) are called as its public function calls them, except that they get the cumulative lengths as "
        "arguments. The public function has XLA compute these, which takes a few microseconds more. These calls are compiled "
        "with the jax that tpu-inference pins, because libtpu 0.0.44 crashes on the append kernel.",
        flywheel,
        flywheel_parameters,
    ),
    Contender(
        "batched_rpa",
        "an experimental kernel in tpu-inference, with the jax that it pins. A first kernel writes a schedule to HBM, and the "
        "attention kernel reads it. For each batch, the better of its own blocks and one other choice (decode: KV tokens, "
        f"sequences at once, buffers: {', '.join(map(str, SCHEDULED_DECODE[1][2:]))}; the others: queries fetched, queries "
        f"computed, and then the same: {', '.join(map(str, SCHEDULED_PREFILL[1]))}). {SPILLS}",
        scheduled("batched_rpa", "pinned", sweeps=True),
        contract_parameters,
    ),
    Contender(
        "stacked_rpa",
        "an experimental kernel in tpu-inference, with the jax that it pins and its own blocks. It is built in the same way "
        f"as batched_rpa. Each of its kernels runs inside a conditional. {SPILLS}",
        scheduled("stacked_rpa", "pinned", sweeps=False),
        contract_parameters,
    ),
    Contender(
        "tokamax",
        "the batched RPA of tokamax 0.0.17, with the jax that its benchmarks pin. It is the same design as batched_rpa, and "
        "gets the same choices of blocks. Its schedule takes a third of SMEM, and the compiler spills nothing to HBM. Measured "
        "times of this kernel are in [calibration.md](calibration.md).",
        scheduled("tokamax", "tokamax", sweeps=True),
        contract_parameters,
    ),
)
