"""RPA v3's schedules: what to compile, a cache of the dumps, and the scalar operands of a batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import dumps

from rpac.schedule.dump import Dump, dump_command

_PEERS = Path(__file__).parent / "peers"
_SCRIPTS = {"v3": _PEERS / "compile_rpa_v3.py", "early": _PEERS / "compile_rpa_v3_early.py"}

Tiles = tuple[int, int, int, int]
"""RPA v3's (queries fetched, KV fetched, queries computed, KV computed) a block, in tokens."""

SMALL: Tiles = (1, 256, 1, 256)
SMALL_MIXED: Tiles = (16, 256, 16, 256)
"""For the kernel of a call that has no work."""

Kernel = Literal["v3", "early"]
"""`early` is RPA v3 as it was in tpu-inference 0.11.1: one kernel for all kinds of batches, with one set of tiles."""


@dataclass(frozen=True)
class Config:
    """One compile of RPA v3. Tiles of None are its defaults; `early` takes its one set from `decode_tiles`."""

    target: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    max_model_len: int
    max_seqs: int
    tokens: int
    pages: int
    decode_tiles: Tiles | None
    mixed_tiles: Tiles | None
    kernel: Kernel = "v3"


def dump(config: Config, python: Callable[[], str], cache: Path) -> Dump:
    """The dump of a config, from the cache or compiled by the interpreter that `python` gives. Raises ScheduleError."""
    fields = asdict(config)
    if fields["kernel"] == "v3":
        del fields["kernel"]
    request = json.dumps(fields, sort_keys=True)
    return dumps.kept(
        cache,
        "rpa-v3",
        request,
        lambda: dump_command([python(), str(_SCRIPTS[config.kernel]), request], config.target),
    )


def parameters(config: Config, kv_lens: Sequence[int], q_lens: Sequence[int], case: str) -> dict[int, list[int]]:
    """The int32 arguments of the call, by parameter number. `case` is `decode` or `mixed`: which kernel has the work."""
    per_seq = config.max_model_len // config.page_size
    padding = config.max_seqs - len(kv_lens)
    ends = [0]
    for q_len in q_lens:
        ends.append(ends[-1] + q_len)
    count = len(kv_lens)
    # Pages in an order that no two neighbours share; which page it is makes no difference to the model.
    table = [(i * 7919) % config.pages for i in range(config.max_seqs * per_seq)]
    return {
        4: [*kv_lens, *[0] * padding],
        5: table,
        6: [*ends, *[ends[-1]] * padding],
        7: [count if case == "decode" else 0, count if case == "decode" else 0, count],
    }


def working_kernel(config: Config, case: str) -> str:
    """How the name of the kernel begins that has the work of a batch."""
    return f"RPA{case[0]}" if config.kernel == "v3" else "RPA-"


def grid(config: Config, kv_lens: Sequence[int]) -> dict[int, list[int]]:
    """The operand of the kernel that XLA computes, and no argument of the call shows: the size of a dynamic grid."""
    return {} if config.kernel == "v3" else {0: [len(kv_lens)]}
