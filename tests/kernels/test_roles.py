"""All ways to play a role define the functions that the rest of the templates use of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from rpac.kernels import templates_dir

ROLES = sorted(folder for folder in templates_dir().glob("*/parts/*") if folder.is_dir())

# Functions that one way defines itself, another in a role of its own (wave_heads), and a third never needs: latent attention
# has no drafts, whose masks ask for it. Those that only latent attention asks for: its keys are transposed in stages, and
# its queries and outputs come and go during the iterations. Writes of new tokens are waited for one by one where buffers
# are used again. Paced orders of the work ask for maxima, which only scores that are masked first have. And what only rows of several new tokens need, which may lie in
# two tiles.
ELSEWHERE = {
    "packed_write": {"wait_for_writes", "wait_for_all_writes"},
    "wave_store": {"wait_for_writes", "wait_for_all_writes"},
    "write_buffers": {"wait_for_writes"},
    "wave_softmax": {"largest_of_tile"},
    "wave_tiles": {"row_of_head", "transpose_keys"},
    "wave_ends": {"use_loads", "stream"},
    "wave_rows": {"patch_tile"},
}


def included(path: Path) -> set[Path]:
    """A template and the files that it includes by name. What it includes by an expression is a role of its own."""
    family = next(folder for folder in path.parents if folder.parent == templates_dir())
    names = re.findall(r'include "([\w/]+\.py\.jinja)"', path.read_text())
    return {path}.union(*(included(family / name) for name in names))


def defined(paths: Iterable[Path]) -> set[str]:
    return {name for path in paths for name in re.findall(r"^ *def (\w+)", path.read_text(), re.MULTILINE)}


def asked(path: Path) -> set[str]:
    """What a template names and defines neither itself nor in what it includes by name."""
    return set(re.findall(r"\w+", path.read_text())) - defined(included(path))


@pytest.mark.parametrize("role", ROLES, ids=lambda role: "-".join(role.parts[-3::2]))
def test_the_ways_to_play_a_role_define_the_same_functions(role: Path) -> None:
    """As far as templates outside name them, where what has a function of that name is a way to play another role."""
    ways = {path.name: included(path) for path in sorted(role.glob("*.jinja"))}
    family = role.parent.parent
    others = {*family.rglob("*.jinja"), *(templates_dir() / "common").rglob("*.jinja")}.difference(*ways.values())
    if family.name == "common":
        others |= set(templates_dir().rglob("*.jinja")).difference(*ways.values())
    names = set().union(*map(asked, others)) - defined(path for path in others if path.parent not in ROLES)
    used = {name: defined(paths) & names - ELSEWHERE.get(role.name, set()) for name, paths in ways.items()}
    assert len(ways) > 1, "a role with one way is none"
    assert len(set(map(frozenset, used.values()))) == 1, used
