"""The tuner, whole: the cases of a spec, their searches, and the data files at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rpac.devices.chip import is_tpu
from rpac.devices.toolchain import toolchain
from rpac.errors import TargetError
from rpac.files.publish import refuse_foreign
from rpac.files.store import Store
from rpac.plan import plan_spec
from rpac.plan.tuned import TunedTiles
from rpac.schedule import check_compiler
from rpac.spec import Spec
from rpac.tune.executors import Evaluate, Pool
from rpac.tune.jobs import run_job
from rpac.tune.results import entry_of, holds_data, merge
from rpac.tune.search import Climb, Outcome, Progress, search


@dataclass(frozen=True)
class Report:
    """What was found for each case, and the files that hold it."""

    outcomes: tuple[Outcome, ...]
    files: tuple[Path, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Cases whose candidates were all rejected."""
        return tuple(one for one in self.outcomes if one.rejected and one.chosen is None)


def tune(
    spec: Spec,
    targets: Sequence[str],
    pool: Pool,
    store: Store,
    *,
    folder: Path,
    kinds: Sequence[str] = (),
    seed: int = 0,
    evaluate: Evaluate = run_job,
    out_of_time: Callable[[], bool] = lambda: False,
    progress: Progress = lambda job, result, stored: None,
) -> Report:
    """Tunes every case of a spec on the TPUs among `targets`, or those of some kinds, and writes `folder/TARGET.json`.

    Raises TargetError where there is no TPU among them, ScheduleError for a compiler whose schedules nobody has verified,
    PlanError for a data file that is none, OutputError where one cannot be written; otherwise as `search`.
    """
    chosen = [target for target in targets if is_tpu(target)]
    if not chosen:
        raise TargetError(f"{spec.file}: no TPU among the targets {', '.join(targets)}; only their kernels are tuned")
    if spec.model.rope_dim is not None:
        raise TargetError(
            f"{spec.file}: attention latent has one set of tiles, with nothing to search; leave it as planned"
        )
    check_compiler(toolchain()["libtpu"])
    for target in chosen:
        TunedTiles.of(target, folder)  # a file that is none is said before the search, not after it
    refuse_foreign(folder, holds_data)  # and so is a folder of something else
    climbs = [
        Climb(part, plan, seed)
        for part in spec.parts
        for target in chosen
        for plan in plan_spec(part, target, tuned=TunedTiles())
        if not kinds or plan.kind in kinds
    ]
    outcomes = search(climbs, pool, store, evaluate=evaluate, out_of_time=out_of_time, progress=progress)
    files = []
    for target in chosen:
        entries = [entry_of(one) for one in outcomes if one.rule.target == target and one.chosen is not None]
        if entries:
            files.append(merge(folder, target, entries))
    return Report(tuple(outcomes), tuple(files))
