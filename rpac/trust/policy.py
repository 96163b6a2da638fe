"""A trust policy: which keys may vouch for a bundle and until when, what they must say of it, and how old that may be.

keys:
  ci-2026:
    public: MCowBQYDK2VwAyEA...
    not_after: 2026-12-31
require:
  provenance: {}
  test-result: {max_age_days: 30}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rpac.errors import Problem, TrustError
from rpac.trust.keys import public_key, read_public
from rpac.trust.predicates import TYPES

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

    from rpac.spec.nodes import Section

_KEYS: Final = ("keys", "require")
_KEY_FIELDS: Final = ("id", "public", "not_before", "not_after")
_NEED_FIELDS: Final = ("max_age_days",)
_HOMES: Final = {
    **dict.fromkeys(_KEYS, ""),
    **dict.fromkeys(_KEY_FIELDS, "a key's name"),
    "max_age_days": "a requirement",
}
_NAME: Final = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_MOST: Final = 64
_MOST_DAYS: Final = 36_500


@dataclass(frozen=True)
class TrustedKey:
    """A key that counts from the start of the day `not_before` to the end of `not_after`, in UTC; None for no limit."""

    name: str
    key: SSlibKey
    not_before: date | None = None
    not_after: date | None = None

    def problem(self, now: datetime) -> str:
        """Why its signatures do not count at a time; empty where they do."""
        today = now.astimezone(UTC).date()
        if self.not_after is not None and today > self.not_after:
            return f"the key {self.name} expired after {self.not_after}"
        if self.not_before is not None and today < self.not_before:
            return f"the key {self.name} counts from {self.not_before} on"
        return ""


@dataclass(frozen=True)
class Policy:
    """`place` names it in messages. `require`: the kinds of statements that must hold, and how old each may be at most.

    One that requires nothing takes any statement about the bundle by one of its keys.
    """

    place: str
    keys: tuple[TrustedKey, ...]
    require: Mapping[str, timedelta | None] = field(default_factory=dict)

    @classmethod
    def of_key(cls, path: Path) -> Policy:
        """One public key, and no requirements. Raises TrustError."""
        return cls(f"--key {path}", (TrustedKey(path.stem, read_public(path)),))

    def with_key(self, path: Path) -> Policy:
        """This policy with one more key. Raises TrustError."""
        return replace(self, keys=(*self.keys, *Policy.of_key(path).keys))


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy in a YAML file. Raises TrustError with every problem in it."""
    from rpac.spec.nodes import MAX_SIZE, Report, Section, compose

    place = os.fspath(path)
    report = Report(place, "a trust policy")
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_SIZE + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        problem = Problem(
            place, None, None, "", f"no file that can be read ({reason})", "must be a trust policy", "check the path"
        )
        raise TrustError([problem]) from error
    root = compose(text, report)
    policy = None
    if root is not None:
        section = Section(report, root, "", _KEYS, _HOMES)
        policy = Policy(place, _keys(section), _requirements(section))
    if report.problems or policy is None:
        raise TrustError(report.in_order())
    return policy


def _keys(root: Section) -> tuple[TrustedKey, ...]:
    if not root.has("keys"):
        root.clash("keys", "must have the keys that may sign", "add `keys:`, as `rpac keygen` prints it", "no such key")
        return ()
    found = root.sections(
        "keys", _NAME, "must be a name of letters, digits, dots and hyphens", _KEY_FIELDS, _HOMES, _MOST
    )
    made = [one for name, section in found.items() if (one := _key(name, section)) is not None]
    ids = [one.key.keyid for one in made]
    for one in made:
        if ids.count(one.key.keyid) > 1:
            found[one.name].clash("public", "must be a key of its own", "remove one of the two", "the key of two names")
    return tuple(made)


def _key(name: str, section: Section) -> TrustedKey | None:
    text = section.text("public", "(?s).+", "must be a public key, the line in its PEM file", "MCowBQYDK2VwAyEA...")
    if text is None:
        return None
    try:
        key = public_key(text, name)
    except TrustError as error:
        (problem,) = error.problems
        section.clash("public", problem.allowed, problem.fix, problem.found)
        return None
    if (
        section.has("id")
        and section.text("id", key.keyid, f"must be {key.keyid}, the id of this public key", key.keyid) is None
    ):
        return None
    first, last = (section.day(name) if section.has(name) else None for name in ("not_before", "not_after"))
    if first is not None and last is not None and first > last:
        section.clash("not_after", f"must not be before not_before, {first}", "write a later day")
    return TrustedKey(name, key, first, last)


def _requirements(root: Section) -> dict[str, timedelta | None]:
    if not root.has("require"):
        return {}
    allowed = f"must be one of {', '.join(TYPES)}"
    found = root.sections("require", "|".join(TYPES), allowed, _NEED_FIELDS, _HOMES, _MOST)
    return {name: _age(section) for name, section in found.items()}


def _age(section: Section) -> timedelta | None:
    if not section.has("max_age_days"):
        return None
    days = section.integer("max_age_days", 1, _MOST_DAYS, 30)
    return None if days is None else timedelta(days=days)
