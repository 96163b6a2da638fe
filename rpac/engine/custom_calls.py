"""Holds what an export calls outside of itself against a list, before anything compiles it.

A bundle is data that somebody made. Its export can name any function that is registered in this process, and a call with
arguments that such a function does not expect ends the process, or worse. rpac's own programs need few. The same is true of
transfers to the host: nobody answers them here, so a program that has one waits for ever.
"""

from __future__ import annotations

import re
from typing import Final

from jax import export

from rpac.errors import BundleError

_ALLOWED: Final = {"tpu": frozenset({"tpu_custom_call"})}
"""By platform: a Pallas kernel, which runs on the TPU itself. Portable programs call nothing."""

COMPILED_AWAY: Final = frozenset({"ApproxTopK"})
"""What a whole step may name too: XLA itself replaces it by its own code, on every platform."""

# In both forms of the text: `custom_call @name(...)`, and the generic form with an attribute.
_CALL: Final = re.compile(r'custom_call\s*@(?:"([^"]*)"|([\w$.-]+))|call_target_name\s*=\s*"([^"]*)"')
_TRANSFER: Final = re.compile(r"\b(?:stablehlo|mhlo)\.(infeed|outfeed|send|recv)\b")


def refuse_custom_calls(what: str, exported: export.Exported, compiled_away: frozenset[str] = frozenset()) -> None:
    """Raises BundleError where an export calls anything that programs of its platforms never need, or waits for the host.

    `what` names it in the message. `compiled_away`: what it may name too, because the compiler itself replaces it.
    """
    allowed, found = outside_calls(exported)
    found -= compiled_away
    if found:
        needs = "call only " + ", ".join(sorted(allowed)) if allowed else "call nothing outside of itself"
        raise BundleError(
            f"{what}: its export calls {', '.join(sorted(found))}; must {needs}; do not use this bundle: no build "
            "of rpac makes such a program; build it again from its spec"
        )


def outside_calls(exported: export.Exported) -> tuple[frozenset[str], set[str]]:
    """What programs of an export's platforms may call outside of themselves, and what this one calls or waits for beyond that."""
    of_each = [_ALLOWED.get(platform, frozenset()) for platform in exported.platforms]
    allowed = frozenset.intersection(*of_each) if of_each else frozenset()
    text = exported.mlir_module()
    called = {next(filter(None, call), "") for call in _CALL.findall(text)} - allowed
    return allowed, called | set(_TRANSFER.findall(text))
