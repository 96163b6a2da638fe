"""All ways to play a role define the functions that the rest of the templates use of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rpac.kernels import templates_dir

FAMILIES = ("xla", "common")  # of templates
ROLES = [
    folder
    for family in FAMILIES
    for folder in sorted((templates_dir() / family / "parts").iterdir())
    if folder.is_dir()
]


def defined(path: Path) -> set[str]:
    return set(re.findall(r"^ *def (\w+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("role", ROLES, ids=lambda role: "-".join(role.parts[-3::2]))
def test_the_ways_to_play_a_role_define_the_same_functions(role: Path) -> None:
    ways = sorted(role.glob("*.jinja"))
    others = [path for path in templates_dir().rglob("*.jinja") if path.parent != role and path not in ways]
    words = {word for path in others for word in re.findall(r"\w+", path.read_text())}
    used = {way.name: defined(way) & words for way in ways}
    assert len(ways) > 1, "a role with one way is none"
    assert len(set(map(frozenset, used.values()))) == 1, used
