"""Times of other kernels that come with rpac: `peers.json`, which benchmarks/report_peers.py writes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from rpac.contract.attention import Attention
from rpac.report.facts import Peer
from rpac.traffic.trace import Workload


def peers_of(model: Attention, page_size: int, target: str, workload: Workload) -> tuple[Peer, ...]:
    """The peers that ran exactly this batch with attention of this shape on this target, the fastest first."""
    if not workload.uniform:
        return ()
    shapes = _data()["shapes"]
    batch = {"sequences": len(workload.q_lens), "new": workload.q_lens[0], "end": workload.kv_lens[0]}
    wanted = {**batch, "page_size": page_size, "target": target}
    found = [
        Peer(row["peer"], 1e-6 * row["microseconds"], row["basis"])
        for row in _data()["rows"]
        if all(row[name] == value for name, value in wanted.items()) and _same(model, shapes[row["heads"]])
    ]
    return tuple(sorted(found, key=lambda peer: peer.seconds))


def peer_versions() -> tuple[str, ...]:
    """The packages that the peers are of, and what compiled them."""
    return tuple(_data()["versions"])


def _same(model: Attention, shape: Mapping[str, Any]) -> bool:
    """Whether it is the same attention, apart from the scale of scores and who quantizes, which take no time of note."""
    plain = model.soft_cap is None and model.attention_chunk is None and model.causal and model.update_cache
    return plain and not model.alibi and all(getattr(model, name) == value for name, value in shape.items())


@functools.cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(files("rpac.report").joinpath("peers.json").read_text())
    return data
