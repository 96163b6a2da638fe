"""Steps of one small model, as tasks and as bundles that are built once a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made import bundle_of

from rpac.build import all_tasks
from rpac.spec import Spec, load_spec
from rpac.step import StepTask, steps_of

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def spec() -> Spec:
    return load_spec(HERE / "llama-step.yaml")


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory, spec: Spec) -> Path:
    """A bundle with the step of llama_step for each kind, with executables for this CPU."""
    folder = tmp_path_factory.mktemp("steps")
    return bundle_of(folder / "a.rpac", spec, "llama_step:step", ("decode", "prefill", "mixed"), native=True)


@pytest.fixture(scope="session")
def task(spec: Spec) -> Callable[..., StepTask]:
    """`task("module:function")` is the decode step of a function for a target."""
    programs = {target: all_tasks(spec, [target]) for target in spec.targets}

    def make(function: str = "llama_step:step", target: str = "cpu", folder: Path = HERE) -> StepTask:
        tasks = steps_of(spec, programs[target], function, str(folder))
        return next(one for one in tasks if one.kind == "decode")

    return make
