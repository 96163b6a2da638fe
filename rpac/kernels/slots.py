"""The Jinja environment of the templates, in which features fill named slots.

A feature is one file, `features/NAME.py.jinja`, of macros that are named by slot. A skeleton or a part offers slots and
does not know which features there are:

    {% slot finish_block %}             the lines of every feature in use that has a macro `finish_block`
    {{ wrapped("scores", "products") }} the expression "products", as each feature's macro `scores(expression)` wraps it
    {{ terms("visible") }}              what every feature's macro `visible` gives, as a list of expressions

Features come in the order of the table in `rpac.contract.features`. Inside a feature's file `uses(OTHER)` says whether
another feature is in use too; only features that really meet may ask it (`benchmarks/conditionals.py` holds the list).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context

from rpac.contract.data import data_dir


def templates_dir() -> Path:
    """Where the templates are."""
    return data_dir("templates")


@functools.cache
def environment(family: str) -> jinja2.Environment:
    """The environment of `pallas_tpu` or `xla` templates; those in `common` are for both."""
    root = templates_dir()
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([root / family, root / "common"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        extensions=[_Slot],
    )
    made.globals |= {"wrapped": _wrapped, "terms": _terms, "uses": _uses}
    return made


class _Slot(Extension):
    """`{% slot name %}` or `{% slot name(argument, ...) %}`."""

    tags = {"slot"}  # noqa: RUF012 - Jinja reads it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        name = parser.stream.expect("name").value
        arguments: list[nodes.Expr] = []
        if parser.stream.skip_if("lparen"):
            while not parser.stream.skip_if("rparen"):
                arguments.append(parser.parse_expression())
                parser.stream.skip_if("comma")
        call = self.call_method("fill", [nodes.ContextReference(), nodes.Const(name), nodes.List(arguments)])
        return nodes.Output([call], lineno=line)

    def fill(self, context: Context, name: str, arguments: list[Any]) -> str:
        return "".join(_filled(context, name, *arguments))


def _filled(context: Context, name: str, *arguments: Any) -> Iterator[str]:
    """What each feature in use makes of a slot, in order; a feature that has no macro of the name is left out."""
    for feature in context["features"]:
        template = context.environment.get_template(f"features/{feature}.py.jinja")
        macro = getattr(template.make_module(context.get_all()), name, None)
        if macro is not None:
            yield str(macro(*arguments))


@jinja2.pass_context
def _wrapped(context: Context, name: str, expression: str, *arguments: Any) -> str:
    for feature in context["features"]:
        template = context.environment.get_template(f"features/{feature}.py.jinja")
        macro = getattr(template.make_module(context.get_all()), name, None)
        if macro is not None:
            expression = str(macro(expression, *arguments)).strip()
    return expression


@jinja2.pass_context
def _terms(context: Context, name: str, *arguments: Any) -> list[str]:
    return [text.strip() for text in _filled(context, name, *arguments) if text.strip()]


@jinja2.pass_context
def _uses(context: Context, feature: str) -> bool:
    return feature in context["features"]
