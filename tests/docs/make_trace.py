"""Writes the trace that docs/scheduling.md uses: the batches of a simulated server, whose load rises and falls.

python make_trace.py day.jsonl
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

from rpac.batch import Limits
from rpac.serving import Scheduler
from rpac.spec import load_spec

STEPS, SEED = 1500, 0


def main(path: Path) -> None:
    rng = np.random.default_rng(SEED)
    scheduler = Scheduler(Limits.of(load_spec("specs/llama3-8b.yaml")))
    lines = []
    while len(lines) < STEPS:
        load = 0.2 * (1 - math.cos(2 * math.pi * len(lines) / STEPS))  # requests a step
        for _ in range(rng.poisson(load)):
            prompt = rng.integers(0, 32000, int(rng.lognormal(6, 0.8)) % 4096 + 1)
            scheduler.add(prompt, int(rng.integers(16, 256)))
        step = scheduler.step()
        if step is None:
            scheduler.add([1], 16)
            continue
        batch = step.batch
        lines.append(json.dumps({"q_lens": [row.q_len for row in batch], "kv_lens": [row.kv_len for row in batch]}))
        scheduler.commit(step, rng.integers(0, 32000, len(step.samples)))
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: {len(lines)} batches")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
