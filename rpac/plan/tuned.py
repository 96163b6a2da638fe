"""Tuned tiles: what a search chose for exactly one case, from the data file of a target in `rpac/tuned/` or a user's folder.

A case is everything that the best tiles can depend on. An entry is for its own case; where a case has none, it may borrow the
tiles of one that differs in token buckets or lengths alone, and little, and then says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from rpac.contract.attention import plain
from rpac.contract.kind import KINDS
from rpac.errors import PlanError
from rpac.plan.decode_blocks import DecodeBlocks
from rpac.plan.decode_waves import DecodeWaves
from rpac.plan.families import Override
from rpac.plan.kernel_plan import KernelPlan, decode_tiles_from, tiles_from
from rpac.plan.prefill import BlockTiles
from rpac.spec import Spec

SCHEMA: Final = 2
FOLDER: Final = Path(__file__).parent.parent / "tuned"
FILE_FIELDS: Final = ("schema", "target", "device_kind", "entries")
ENTRY_FIELDS: Final = ("key", "tiles", "evidence")
OVERRIDE: Final = "recipe"  # of an entry whose recipe is not the rule's for its tiles
TILES_FIELDS: Final = ("decode", "block")
# `origin` reads the first of these; the others are for people.
EVIDENCE_FIELDS: Final = (
    "score", "seed", "toolchain", "spec", "complete", "batches", "rule", "chosen", "tried", "rejected"
)  # fmt: skip

# In doublings: how far the largest bucket, and each end of the lengths, may be from those of the case borrowed from.
NEAR: Final = 2.0
MAY_DIFFER: Final = ("tokens", "length_class")  # of the case that borrows and of the case borrowed from
_MOST: Final = 2**31  # far above any bucket or length

# What tiles do not depend on, or what another part of the key says.
_NO_PART: Final = {
    "sm_scale", "max_model_len", "max_num_tokens", "token_buckets", "context_lens", "num_pages"
}  # fmt: skip


def key_of(spec: Spec, kind: str, tokens: Sequence[int]) -> dict[str, Any]:
    """A case as plain data. A feature is part of it where it is used, so that no old entry is for new cases.

    `length_class`: the powers of two around the lengths that serving expects.
    """
    lengths = spec.serving.context_lens
    fields = {**plain(spec.model), **plain(spec.serving)}
    return {
        **{name: value for name, value in fields.items() if name not in _NO_PART},
        "kind": kind,
        "tokens": list(tokens),
        "pages_per_seq": spec.serving.pages_per_seq,
        "length_class": [1 << (min(lengths).bit_length() - 1), 1 << (max(lengths) - 1).bit_length()],
    }


def key_text(key: Mapping[str, Any]) -> str:
    """A case as text: what entries are compared and sorted by."""
    return json.dumps(key, sort_keys=True)


@dataclass(frozen=True)
class Entry:
    """One case: the tiles chosen, as plain data, and what that rests on. `place` is where it was read, for messages.

    `recipe` has the decisions that are not the rule's for these tiles, as plain data.
    """

    key: Mapping[str, Any]
    data: Mapping[str, Any]
    evidence: Mapping[str, Any]
    place: str
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tiles(self) -> tuple[DecodeBlocks | DecodeWaves | None, BlockTiles | None]:
        """Raises PlanError where this rpac's tiles have other fields, which is so after its kernels changed."""
        try:
            for part, other in (("decode", "prefill"), ("block", "decode")):
                if (self.data[part] is None) != (self.key["kind"] == other):
                    raise ValueError(f"tiles.{part}: must be null for {other} batches, and only there")
            return decode_tiles_from(self.data["decode"]), tiles_from(BlockTiles, self.data["block"])
        except ValueError as error:
            raise self.stale(error) from error

    @property
    def override(self) -> Override:
        """The decisions that are not the rule's. Raises PlanError for names that are no decisions."""
        try:
            return Override.from_dict(self.recipe)
        except ValueError as error:
            raise self.stale(error) from error

    def stale(self, error: ValueError) -> PlanError:
        """The error for an entry that is of other kernels."""
        return PlanError(
            f"{self.place}: not the tiles of these kernels: {error}; remove the entry and run rpac tune again"
        )

    def as_dict(self) -> dict[str, Any]:
        """What a data file holds of it."""
        override = {OVERRIDE: self.recipe} if self.recipe else {}
        return {"key": self.key, "tiles": self.data, **override, "evidence": self.evidence}

    @property
    def origin(self) -> str:
        """A line for people: how good, and by what evidence."""
        score, found = self.evidence["score"], self.evidence
        gain = "the rule's cannot be timed" if score is None else f"{score:.3f} of the rule's time"
        search = "" if found["complete"] else ", search cut short"
        return f"tuned: {gain}, predicted with libtpu {found['toolchain']['libtpu']}, seed {found['seed']}{search}"

    @property
    def interpolated(self) -> str:
        """The same line for a case that borrows the tiles."""
        buckets, lengths = (" ".join(map(str, self.key[name])) for name in MAY_DIFFER)
        return f"interpolated from token buckets {buckets}, lengths {lengths}; there {self.origin}"


class TunedTiles:
    """The entries of one target by case."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = {key_text(entry.key): entry for entry in entries}

    @classmethod
    def of(cls, target: str, folder: Path | None = None) -> TunedTiles:
        """What `folder`, or else the package, holds for a target; nothing where there is no file.

        Raises PlanError for a file that is not what a search writes.
        """
        path = (folder or FOLDER) / f"{target}.json"
        try:
            text = path.read_text()
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot be read ({error}); restore or remove it") from error
        return cls(parse(text, target, str(path)))

    @classmethod
    def over_package(cls, target: str, folder: Path | None) -> TunedTiles:
        """What the package holds for a target, or `folder`, if any, where both have a case. Raises as `of`."""
        own = () if folder is None else cls.of(target, folder).entries.values()
        return cls([*cls.of(target).entries.values(), *own])

    def find(self, spec: Spec, plan: KernelPlan) -> Entry | None:
        """The entry for exactly the case of a plan."""
        return self.entries.get(key_text(key_of(spec, plan.kind, plan.tokens)))

    def nearest(self, spec: Spec, plan: KernelPlan) -> Entry | None:
        """The entry to borrow from: nothing but token buckets and lengths differ, and no less than any other entry's do."""
        key = key_of(spec, plan.kind, plan.tokens)
        near = [(_doublings(key, entry.key), text, entry) for text, entry in self.entries.items()]
        return min((one for one in near if one[0] <= NEAR), default=(0.0, "", None), key=lambda one: one[:2])[2]


Tuned: TypeAlias = Callable[[str], TunedTiles]
"""The tuned tiles of a target by its name."""


def _doublings(key: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far two cases are apart, in doublings; infinite where anything but token buckets and lengths differs."""
    fixed, others = ({name: value for name, value in one.items() if name not in MAY_DIFFER} for one in (key, other))
    if fixed != others:
        return math.inf
    sizes = [(one["tokens"][-1], *one["length_class"]) for one in (key, other)]
    return max(abs(math.log2(a / b)) for a, b in zip(*sizes, strict=True))


def parse(text: str, target: str, place: str) -> list[Entry]:
    """The entries of a data file. Raises PlanError, naming the part, for anything else."""
    try:
        data = _fields(json.loads(text), FILE_FIELDS, "file")
        _expect(data["schema"], SCHEMA, "schema")
        _expect(data["target"], target, "target")
        if not isinstance(data["entries"], list):
            raise ValueError("entries: must be a list")
        entries = [_entry(one, f"entries[{index}]", place) for index, one in enumerate(data["entries"])]
        if len({key_text(entry.key) for entry in entries}) < len(entries):
            raise ValueError("entries: two have one key")
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{place}: {error}; restore it, or remove it and run rpac tune again") from error
    return entries


def _entry(data: Any, where: str, place: str) -> Entry:
    names = (*ENTRY_FIELDS, OVERRIDE) if isinstance(data, dict) and OVERRIDE in data else ENTRY_FIELDS
    entry = _fields(data, names, where)
    if not isinstance(entry["key"], dict):
        raise ValueError(f"{where}.key: found {entry['key']!r}; must be an object")
    _check_case(entry["key"], f"{where}.key")
    tiles = _fields(entry["tiles"], TILES_FIELDS, f"{where}.tiles")
    evidence = _fields(entry["evidence"], EVIDENCE_FIELDS, f"{where}.evidence")
    if not (evidence["score"] is None or (type(evidence["score"]) is float and evidence["score"] > 0)):
        raise ValueError(f"{where}.evidence.score: found {evidence['score']!r}; must be a number above 0, or null")
    if not isinstance(evidence["toolchain"], dict) or "libtpu" not in evidence["toolchain"]:
        raise ValueError(f"{where}.evidence.toolchain: must be an object with libtpu")
    recipe = entry.get(OVERRIDE, {})
    if not isinstance(recipe, dict):
        raise ValueError(f"{where}.{OVERRIDE}: found {recipe!r}; must be an object")
    return Entry(entry["key"], tiles, evidence, f"{place}: {where}", recipe)


def _check_case(key: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where a case lacks what it is compared by; the rest of it is only equal to another's or not."""
    if key.get("kind") not in KINDS:
        raise ValueError(f"{where}.kind: found {key.get('kind')!r}; must be one of {', '.join(KINDS)}")
    for name, sizes in (("tokens", 1), ("length_class", 2)):
        found = key.get(name)
        numbers = found if isinstance(found, list) else []
        sound = all(type(one) is int and 0 < one <= _MOST for one in numbers)
        if not sound or len(numbers) < sizes or (name == "length_class" and len(numbers) > sizes):
            what = "two integers" if name == "length_class" else "integers, one at least"
            raise ValueError(f"{where}.{name}: found {found!r:.80}; must be a list of {what}, above 0")


def _fields(data: Any, names: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        found = ", ".join(sorted(data)) if isinstance(data, dict) else repr(data)[:80]
        raise ValueError(f"{where}: found {found}; must be an object with {', '.join(names)}")
    return data


def _expect(found: Any, wanted: str | int, where: str) -> None:
    if type(found) is not type(wanted) or found != wanted:
        raise ValueError(f"{where}: found {found!r}; must be {wanted!r}")
