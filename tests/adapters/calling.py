"""Calls of an adapter as its peer is called, for tests."""

from __future__ import annotations

import inspect
from typing import Any

from fake import ADAPTERS, arguments

NAMES = sorted(ADAPTERS)


def call(name: str, engine: Any, *given: Any, **options: Any) -> Any:
    """The adapter on `given`, else on a decode batch of 2 rows, with the bundle's scale unless `options` say otherwise."""
    attention = ADAPTERS[name].make(engine)
    args = list(given or arguments(name, engine))
    keywords = {ADAPTERS[name].scale: engine.model.sm_scale, **options}
    parameters = inspect.signature(attention).parameters
    for at, (argument, parameter) in enumerate(parameters.items()):
        if argument in keywords and parameter.kind is not parameter.KEYWORD_ONLY:
            args[at:] = [keywords.pop(argument)]  # those are the last of a signature's
    return attention(*args, **keywords)
