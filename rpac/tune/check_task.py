"""Child process: runs one plan's kernel against the oracle, and prints why it fails, or nothing.

python -m rpac.tune.check_task CHECK.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rpac.devices.toolchain import prepare
from rpac.kernels import render
from rpac.plan import KernelPlan
from rpac.spec import parse_spec


def main(path: str) -> None:
    """A few batches say enough of tiles that are new; `rpac check` has them all."""
    prepare()  # before JAX is imported
    import numpy as np

    from rpac.check.batches import batches_of
    from rpac.check.run import check_source

    data = json.loads(Path(path).read_text())
    spec = parse_spec(data["spec"], data["file"]).part(data["layer"])
    plan = KernelPlan.from_dict(data["plan"])
    first, *_, random = batches_of(spec, plan, np.random.default_rng(data["seed"]), random_batches=1)
    for result in check_source(spec, plan, render(spec, plan), batches=[first, random], seed=data["seed"]):
        if not result.ok:
            causes = [*result.races, *result.notes]
            if result.error > result.tolerance:
                causes.append(f"error {result.error:.3g}, tolerance {result.tolerance:.3g}")
            if not result.cache_ok:
                causes.append("the cache differs")
            print(f"oracle, batch {result.batch!r}, {result.mode}: {'; '.join(causes)}".replace("\n", " "))
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
