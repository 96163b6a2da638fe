"""Puts the parts of a source together: header, imports, constants, helpers, one or two kernels, and the program."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from rpac.kernels.constants import Constant, used_in, with_prefix
from rpac.kernels.prune import pruned


@dataclass(frozen=True)
class Kernel:
    """One kernel of a source: its skeleton, what the skeleton shows, and its constants.

    `prefix` stands before the names of its tile constants in a source that has another kernel.
    """

    template: str
    context: Mapping[str, Any]
    constants: Sequence[Constant]
    prefix: str


def assembled(
    templates: jinja2.Environment,
    context: Mapping[str, Any],
    kernels: Sequence[Kernel],
    *,
    imports: str = "imports.py.jinja",
    helpers: str = "helpers.py.jinja",
    program: str = "program.py.jinja",
) -> str:
    """The source: `context` is for all templates, each kernel's own is added for its skeleton.

    Helpers are functions of the module that any kernel may call; they may name the constants of the model alone. What no
    kernel calls and no code names is left out.
    """
    texts: list[str] = []
    constants: list[Constant] = []
    for kernel in kernels:
        text, own = templates.get_template(kernel.template).render({**context, **kernel.context}), kernel.constants
        if len(kernels) > 1:
            text, own = with_prefix(text, own, kernel.prefix)
        texts.append(text)
        constants += [constant for constant in own if constant not in constants]
    shown = {**context, **kernels[0].context} if len(kernels) == 1 else context
    first, last = (templates.get_template(name).render(shown) for name in (helpers, program))
    body = pruned("\n\n\n".join([first, *texts, last]))
    used = used_in(body, constants)
    clashes = {one.name for one in used} if len({one.name for one in used}) < len(used) else set()
    assert not clashes, f"constants of two kernels share a name and differ: {sorted(clashes)}"
    of_model = "\n".join(str(one) for one in used if not one.tile)
    of_tiles = "\n".join(str(one) for one in used if one.tile)
    head = templates.get_template("parts/header.py.jinja").render(context).rstrip("\n")
    top = head, "", _needed(templates.get_template(imports).render(context), body)
    return "\n".join([*top, "", "\n\n".join(filter(None, (of_model, of_tiles))), "\n", body])


def _needed(imports: str, body: str) -> str:
    """The imports without those that the source does not use."""

    def used(line: str) -> bool:
        names = re.split(r",\s*", re.sub(r"^.*\b(import|as)\s+", "", line))
        return not line.strip() or any(re.search(rf"\b{name.strip()}\b", body) for name in names)

    return "".join(line for line in imports.splitlines(keepends=True) if used(line)).strip("\n")
