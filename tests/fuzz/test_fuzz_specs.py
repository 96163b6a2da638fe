"""Any text is a spec or an error that says where and what, in two seconds; and what is a spec can be planned or is refused."""

from __future__ import annotations

import random
import time

from command import ROOT
from fuzzing import fuzz, mutate_text

from rpac.errors import PlanError, SpecError
from rpac.plan import plan_spec
from rpac.spec import parse_spec

SPECS = [path.read_bytes() for path in sorted((ROOT / "specs").glob("*.yaml"))]
EVERY = b"\n".join(SPECS)
SECONDS = 2.0


def test_specs() -> None:
    def make(rng: random.Random) -> bytes:
        return mutate_text(rng, rng.choice(SPECS), EVERY)

    fuzz("specs", 250, make, answered)


def answered(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return  # load_spec refuses it before it is parsed
    begun = time.process_time()
    try:
        spec = parse_spec(text, "fuzz.yaml")
        for part in spec.parts:
            for target in spec.targets:
                plan_spec(part, target)
    except SpecError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.found and problem.allowed and problem.fix, problem
        str(error).encode()
    except PlanError as error:
        str(error).encode()
    took = time.process_time() - begun
    assert took < SECONDS, f"took {took:.1f} s"
