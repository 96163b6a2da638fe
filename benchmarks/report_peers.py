"""Writes rpac/report/peers.json, the times of peers that `rpac report` shows, from what benchmarks/peers.py has run.

    python benchmarks/report_peers.py

Of each peer and batch it takes the tiles with the least time. Only batches of sequences that are all alike are kept, because a
report knows a batch by its lengths.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peers.cases import HEADS, MEASURED, Case, Heads, Place
from peers.contenders import OURS
from peers.environment import COMPILER, PEERS, TOKAMAX

RESULTS = Path(__file__).parent / "peers" / "results.json"
OUTPUT = Path(__file__).parents[1] / "rpac" / "report" / "peers.json"
VERSIONS = [one for one in (*PEERS, *TOKAMAX, *COMPILER) if "jaxlib" not in one]
BY_LABEL = {heads.label: heads for heads in HEADS}
Key = tuple[str, Place, str, str]


def shape(heads: Heads) -> dict[str, Any]:
    """What must be equal in a spec's attention, in a device's heads."""
    return {
        "q_heads": heads.q_heads,
        "kv_heads": heads.kv_heads,
        "head_dim": heads.head_dim,
        "kv_dtype": heads.kv_dtype,
        "sliding_window": heads.sliding_window,
        "sinks": heads.sinks,
        "rope_dim": heads.rope_dim,
    }


def best(results: dict[str, dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """The result with the least time of each attention, place, peer and batch."""
    found: dict[Key, dict[str, Any]] = {}
    for name, result in results.items():
        heads, target, page, who, case, _ = name.split(" | ")
        key = (heads, (target, int(page)), who, case)
        if who in {one.name for one in OURS} or result["error"]:
            continue
        if key not in found or result["seconds"] < found[key]["seconds"]:
            found[key] = result
    return found


def rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each attention, place, batch and peer."""
    predicted = [(*key, result["seconds"], "predicted") for key, result in best(results).items()]
    measured = [(one.heads, one.place, one.peer, one.case, one.seconds, f"measured: {one.source}") for one in MEASURED]
    made = []
    for label, (target, page), who, name, seconds, basis in [*predicted, *measured]:
        case = next((case for case in BY_LABEL[label].cases if case.label == name), None)
        if case is not None and case.workload.uniform:
            made.append({"heads": label, "target": target, "page_size": page, **batch(case), "peer": who,
                         "microseconds": round(1e6 * seconds, 1), "basis": basis})  # fmt: skip
    return sorted(made, key=lambda row: json.dumps(row, sort_keys=True))


def batch(case: Case) -> dict[str, int]:
    """A batch of sequences that are alike."""
    return {"sequences": len(case.workload.q_lens), "new": case.workload.q_lens[0], "end": case.workload.kv_lens[0]}


def text() -> str:
    """The file: a row on each line."""
    made = rows(json.loads(RESULTS.read_text()))
    shapes = {label: shape(BY_LABEL[label]) for label in dict.fromkeys(row["heads"] for row in made)}
    parts = [f'"versions": {json.dumps(VERSIONS)}', f'"shapes": {json.dumps(shapes)}']
    lines = ",\n".join(json.dumps(row) for row in made)
    return "{" + ",\n".join(parts) + f',\n"rows": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    OUTPUT.write_text(text())
