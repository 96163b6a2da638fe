"""Plants bugs into kernels, one at a time, and writes which of them the check catches, for `rpac sign --mutations`.

python tests/check/plant_bugs.py build/mutations.json               every bug; hours
python tests/check/plant_bugs.py build/mutations.json ordinary      those that the ordinary tests plant
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

from bugs import all_suites
from mutation import SEED, Bug, BugSuite, check_bug

from rpac.trust.provenance import own_files


def planted(suites: list[BugSuite], ordinary: bool) -> Iterator[dict[str, object]]:
    """Each bug by its name, and whether it was caught."""
    for suite in suites:
        for bug in suite.bugs:
            if not ordinary or bug.name in suite.ordinary:
                found = {"name": f"{suite}: {bug}", "caught": is_caught(suite, bug)}
                print(f"{'caught' if found['caught'] else 'MISSED'}  {found['name']}", file=sys.stderr)
                yield found


def is_caught(suite: BugSuite, bug: Bug) -> bool:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            check_bug(suite.spec, suite.make_plan(suite.spec), bug)
    except AssertionError:
        return False
    return True


def main(out: Path, ordinary: bool) -> None:
    files = own_files()  # before the hours in which somebody may edit them
    bugs = list(planted(all_suites(), ordinary))
    data = {"format": "rpac mutations", "schema": 1, "files": files, "seed": SEED, "ordinary": ordinary, "bugs": bugs}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")
    caught = sum(bool(one["caught"]) for one in bugs)
    print(f"{out}: the check caught {caught} of {len(bugs)} planted bugs")
    sys.exit(caught < len(bugs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "ordinary" in sys.argv[2:])
