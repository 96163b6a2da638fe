"""No text of a spec, a plan or a file's name is ever code: a source has the same code whatever they say."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from rpac.contract.attention import Attention, Serving
from rpac.kernels import render
from rpac.kernels.literals import prose
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec, load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
HOSTILE = [
    'a"""\nimport os\nos.abort()\n"""',
    "a'''\nimport os\n'''",
    "a\n\nimport os",
    "a\rimport os",
    "a\x0cimport os\x00",
    'a\\"""\\',
    "a\\",
    "\\N{BULLET} \\x22\\x22\\x22",
    "{{ ''.__class__ }} {% raw %} {# x #}",
    "${x} {0} %s",
    "\u2028import os\u0085import os",
    "\u65e5\u672c\u8a9e \U0001f600 \ud800",
    "# type: ignore",
    "bfloat16)\nimport os\n(jnp.bfloat16",
    "../../separate",
]


def with_model(name: str, model: Attention, **serving: Any) -> Spec:
    return replace(TINY, name=name, layer="full", model=model, serving=replace(TINY.serving, **serving))


EIGHT_BITS = replace(TINY.model, kv_dtype="int8", kv_scale="head", quantize="kernel")
LATENT = Attention(16, 1, 128, "bfloat16", "bfloat16", 0.1, rope_dim=64)
SPECS = [
    with_model("interleaved", TINY.model),
    with_model("separate", TINY.model, kv_layout="separate", decode_len=4, tree_mask=True),
    with_model("bytes", EIGHT_BITS, log_sum_exp=True),
    with_model("latent", LATENT, kv_layout="latent"),
]
PLANS = [(spec, plan) for spec in SPECS for target in ("tpu7x", "cpu") for plan in plan_spec(spec, target)[-1:]]


def code(text: str) -> str:
    """The code of a source, without its header."""
    tree = ast.parse(text)
    assert ast.get_docstring(tree) is not None
    return ast.dump(ast.Module(tree.body[1:], tree.type_ignores))


def string_fields(kind: type) -> list[str]:
    """The fields of a dataclass that may hold text."""
    hints = typing.get_type_hints(kind)
    return [field.name for field in fields(kind) if "str" in str(hints[field.name]) and field.init]


def with_text(spec: Spec, text: str) -> Iterator[tuple[str, Spec]]:
    """The spec with each of its texts, one at a time, set to another behind the parser's back."""
    for name in string_fields(Spec):
        values: dict[str, Any] = {"targets": (text, *spec.targets), "layers": ((text, spec.model),)}
        yield name, replace(spec, **{name: values.get(name, text)})
    for name in string_fields(Attention):
        yield f"model.{name}", replace(spec, model=replace(spec.model, **{name: text}))
    for name in string_fields(Serving):
        yield f"serving.{name}", replace(spec, serving=replace(spec.serving, **{name: text}))


def test_the_fields_that_hold_text_are_all_found() -> None:
    assert {"name", "layer", "file", "source", "targets", "layers"} <= set(string_fields(Spec))
    assert {"q_dtype", "kv_dtype", "kv_scale", "quantize"} <= set(string_fields(Attention))
    assert "kv_layout" in string_fields(Serving)


def rendered(spec: Spec, plan: KernelPlan) -> str | None:
    """The code of a source, or None where the spec has a word that no source is made of."""
    try:
        source = render(spec, plan)
    except (ValueError, LookupError):
        return None
    assert source.text.isascii()
    return code(source.text)


@pytest.mark.parametrize(("spec", "plan"), PLANS, ids=lambda one: getattr(one, "path", getattr(one, "name", "")))
def test_no_text_of_a_spec_is_code(spec: Spec, plan: KernelPlan) -> None:
    """A field that does not choose code may say anything; one that does has a word that is known, or is as any other."""
    usual = rendered(spec, plan)
    assert usual is not None
    harmless = {name: rendered(other, plan) for name, other in with_text(spec, "harmless")}
    assert all(harmless[name] == usual for name in string_fields(Spec))
    assert harmless["model.kv_dtype"] is None
    for text in ("".join(HOSTILE), HOSTILE[0]):
        for name, other in with_text(spec, text):
            assert rendered(other, plan) == harmless[name], name


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_no_text_of_tuned_tiles_is_code(text: str) -> None:
    spec, plan = PLANS[0]
    source = render(spec, replace(plan, origin=f"tuned: {text}"))
    assert code(source.text) == code(render(spec, plan).text)
    assert source.text.isascii()


@pytest.mark.parametrize("text", [*HOSTILE, "plain text, as it is: (1 + 2) * 3; it's 'quoted'"], ids=ascii)
def test_a_docstring_of_escaped_text_holds_the_text(text: str) -> None:
    escaped = prose(text)
    assert escaped.isascii()
    assert escaped.isprintable()
    assert ast.literal_eval(f'"""{escaped}"""') == text


def test_a_source_does_not_name_the_file_of_its_spec() -> None:
    for spec, plan in PLANS:
        assert render(replace(spec, file='b"""\n.yaml', source="# other"), plan) == render(spec, plan)
        assert f"    rpac build SPEC --target {plan.target}\n" in render(spec, plan).text
