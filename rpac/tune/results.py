"""Writes what searches found into the data file of a target, beside what it holds for other cases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rpac.devices.chip import chip
from rpac.devices.toolchain import toolchain
from rpac.files.publish import publish
from rpac.plan.families import override_of
from rpac.plan.tuned import SCHEMA, Entry, TunedTiles, key_of, key_text, parse
from rpac.tune.search import Outcome

WIDTH: Final = 120
WAIT_S: Final = 60.0  # for another search that writes
_HERE: Final = ("python",)  # of the toolchain: what does not change what is compiled


def entry_of(outcome: Outcome) -> Entry:
    """What the file holds for a case with a choice: its tiles, the decisions that are not the rule's, and the evidence."""
    assert outcome.chosen is not None
    plan, score = outcome.chosen.plan, outcome.score(outcome.chosen)
    evidence = {
        "score": None if score is None else _stable(score),
        "seed": outcome.seed,
        "toolchain": {name: value for name, value in toolchain().items() if name not in _HERE},
        "spec": outcome.spec.name,
        "complete": outcome.complete,
        "batches": [asdict(batch) for batch in outcome.batches],
        "rule": _tiles(outcome.rule),
        "chosen": outcome.chosen.label,
        "tried": [
            {
                "label": one.label,
                "score": None if score is None else _stable(score),
                "seconds": [*map(_stable, one.seconds)],
            }
            for one, score in ((one, outcome.score(one)) for one in outcome.tried)
        ],
        "rejected": [{"label": label, "reason": reason} for label, reason in outcome.rejected.items()],
    }
    recipe = override_of(outcome.spec, plan).as_dict()
    return Entry(key_of(outcome.spec, plan.kind, plan.tokens), _tiles(plan), evidence, "", recipe)


def merge(folder: Path, target: str, entries: Sequence[Entry]) -> Path:
    """Puts entries in the place of those with their keys, whole or not at all; returns the file.

    Raises PlanError where the file is none of ours, OutputError where it cannot be written.
    """
    name = f"{target}.json"
    with publish(folder, holds_data, WAIT_S) as stage:
        old = TunedTiles.of(target, folder)
        new = {**old.entries, **TunedTiles(entries).entries}
        text = text_of(target, list(new.values()))
        parse(text, target, name)  # what is written can be read
        for path in folder.glob("*.json"):
            if path.name != name:
                stage.write(path.name, path.read_bytes())
        stage.write(name, text.encode())
    return folder / name


def text_of(target: str, entries: Sequence[Entry]) -> str:
    """A data file: the same text for the same entries, in any order; lists of numbers and small objects on one line."""
    ordered = [entry.as_dict() for entry in sorted(entries, key=lambda entry: key_text(entry.key))]
    data = {"schema": SCHEMA, "target": target, "device_kind": chip(target).device_kind, "entries": ordered}
    return _text(data, 0) + "\n"


def holds_data(folder: Path) -> bool:
    """Whether a folder holds nothing but data files, by their names."""
    return all(path.suffix == ".json" for path in folder.iterdir())


def _tiles(plan: Any) -> dict[str, Any]:
    return {
        part: None if tiles is None else asdict(tiles)
        for part, tiles in (("decode", plan.decode), ("block", plan.block))
    }


def _stable(value: float) -> float:
    """Six digits: more would differ with the last bit of a logarithm."""
    return float(f"{value:.6g}")


def _text(value: Any, indent: int, column: int = 0) -> str:
    """`column`: where the value begins, beyond its indent."""
    line = json.dumps(value, sort_keys=True)
    numbers = isinstance(value, list) and all(type(one) is int for one in value)
    if numbers or not isinstance(value, (Mapping, list)) or indent + column + len(line) < WIDTH:
        return line
    if isinstance(value, Mapping):
        names = {json.dumps(name): value[name] for name in sorted(value)}
        parts = [f"{name}: {_text(part, indent + 1, len(name) + 2)}" for name, part in names.items()]
    else:
        parts = [_text(part, indent + 1) for part in value]
    first, last = "{}" if isinstance(value, Mapping) else "[]"
    pad = "\n" + " " * (indent + 1)
    return f"{first}{pad}{f',{pad}'.join(parts)}\n{' ' * indent}{last}"
