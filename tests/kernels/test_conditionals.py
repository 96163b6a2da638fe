"""benchmarks/conditionals.py counts what it should, and finds features that are asked for in the wrong place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def counted(tmp_path: Path, templates: dict[str, str], *options: str) -> tuple[int, str]:
    """The exit status and the output of the script on some templates."""
    for name, text in templates.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, ROOT / "benchmarks" / "conditionals.py", "--templates", tmp_path, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout + done.stderr


BRANCHES = """{% if a %}
{% elif b %}
{{ c if d else e }}
{% endif %}
{% slot finish %}
{% set f = 1 if g %}
"""


def test_every_form_of_a_conditional_counts_once(tmp_path: Path) -> None:
    status, output = counted(tmp_path, {"a.py.jinja": BRANCHES, "parts/b.py.jinja": "{{ name }}"}, "--limit", "4")
    assert status == 0
    assert "4  a.py.jinja" in output
    assert "4  all 2 templates" in output


def test_more_conditionals_than_the_limit_fail(tmp_path: Path) -> None:
    status, output = counted(tmp_path, {"a.py.jinja": BRANCHES}, "--limit", "3")
    assert status == 1
    assert "4 conditionals; the limit is 3" in output


@pytest.mark.parametrize(
    "text, feature",
    [
        ("{% if sinks %}{% endif %}", "sinks"),
        ("{{ model.soft_cap }}", "soft_cap"),
        ('{{ uses("causal") }}', "causal"),
        ('{{ "x" if "causal" in features }}', "features"),
    ],
)
def test_a_part_may_not_ask_for_a_feature(tmp_path: Path, text: str, feature: str) -> None:
    status, output = counted(tmp_path, {"xla/parts/a.py.jinja": "\n" + text})
    assert status == 1
    assert f"xla/parts/a.py.jinja:2: asks for {feature}: only a template in features/ may" in output


def test_a_feature_may_ask_for_itself_and_not_for_one_that_it_does_not_meet(tmp_path: Path) -> None:
    own = {"xla/features/kv_scale.py.jinja": '{% if kv_scale == "tensor" %}{% endif %}'}
    assert counted(tmp_path, own)[0] == 0
    other = {"xla/features/kv_scale.py.jinja": '{% if uses("tree_mask") %}{% endif %}'}
    status, output = counted(tmp_path, other)
    assert status == 1
    assert "features/kv_scale.py.jinja:1: asks for tree_mask, which kv_scale does not meet" in output


def test_names_that_a_template_sets_or_writes_are_not_asked_for(tmp_path: Path) -> None:
    text = "{% macro scores(causal) %}{% endmacro %}{% set sinks = 1 %}sinks, kv_scale = {{ capped }}"
    assert counted(tmp_path, {"xla/parts/a.py.jinja": text})[0] == 0
