"""Bugs to put into a generated kernel by hand, and whether the check catches them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from rpac.check import check_source
from rpac.contract.program import Source
from rpac.kernels import render
from rpac.plan import KernelPlan
from rpac.plan.families import RULES, Override
from rpac.plan.planner import with_tiles
from rpac.spec import Spec

SEED = 0
SECONDS = 120.0  # a run takes less than one, on a machine with nothing else to do
HANG = 10.0  # of a run that will not end


@dataclass(frozen=True)
class Mutation:
    """A bug: what it is, and the edit of the generated text that makes it."""

    bug: str
    pattern: str  # a regular expression; ^ and $ match at lines
    replacement: str
    hangs: bool = False

    def apply(self, source: Source) -> Source:
        """The source with the bug in its last kernel. Fails where the template no longer has what it edits."""
        parts = _parts(source.text)
        edited = [re.subn(self.pattern, self.replacement, part, flags=re.MULTILINE) for part in parts]
        # The decode kernel of a mixed program stays as it is.
        texts = [text if index != 1 or len(parts) < 3 else parts[1] for index, (text, _) in enumerate(edited)]
        count = sum(found for index, (_, found) in enumerate(edited) if index != 1 or len(parts) < 3)
        assert count == 1, f"{self.bug}: found {count} of {self.pattern!r} in {source.path}"
        return Source(source.path, "".join(texts))


def _parts(text: str) -> list[str]:
    """What stands before the kernels, then each kernel with what follows it."""
    return re.split(r"^(?=@dataclasses\.dataclass\nclass \w+Kernel\()", text, flags=re.MULTILINE)


def dropped(bug: str, statement: str, hangs: bool = False) -> Mutation:
    """A statement of one line that is not there."""
    return Mutation(bug, rf"^( *){statement}$", r"\1pass", hangs)


def retiled(
    spec: Spec,
    plan: KernelPlan,
    decode: dict[str, Any] | None = None,
    block: dict[str, Any] | None = None,
    override: Override = RULES,
) -> KernelPlan:
    """A plan with some fields of its tiles changed, and the recipe that follows from them but for an override."""
    tiles = [
        replace(tiles, **changes) if changes else tiles  # type: ignore[type-var]
        for tiles, changes in ((plan.decode, decode), (plan.block, block))
    ]
    found = with_tiles(spec, plan, *tiles, override)  # type: ignore[arg-type]
    assert found is not None
    return found


def check_bug(spec: Spec, plan: KernelPlan, mutation: Mutation) -> None:
    """Fails where no batch shows the bug."""
    time_limit = HANG if mutation.hangs else SECONDS
    source = mutation.apply(render(spec, plan))
    results = check_source(spec, plan, source, seed=SEED, time_limit=time_limit)
    caught = next((result for result in results if not result.ok), None)
    assert caught is not None, "the bug goes unseen"
    print(caught)
    assert mutation.hangs or not any("did not end" in note for note in caught.notes)
