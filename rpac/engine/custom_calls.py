"""Holds what an export calls outside of itself against a list, before anything compiles it.

A bundle is data that somebody made. Its export can name any function that is registered in this process, and a call with
arguments that such a function does not expect ends the process, or worse. rpac's own programs need few.
"""

from __future__ import annotations

import re
from typing import Final

from jax import export

from rpac.contract.program import Variant
from rpac.errors import BundleError

_ALLOWED: Final = {"tpu": frozenset({"tpu_custom_call"})}
"""By platform: a Pallas kernel, which runs on the TPU itself. Portable programs call nothing."""

# In both forms of the text: `custom_call @name(...)`, and the generic form with an attribute.
_CALL: Final = re.compile(r'custom_call\s*@(?:"([^"]*)"|([\w$.-]+))|call_target_name\s*=\s*"([^"]*)"')


def refuse_custom_calls(variant: Variant, exported: export.Exported) -> None:
    """Raises BundleError where a program calls anything that programs of its platforms never need."""
    of_each = [_ALLOWED.get(platform, frozenset()) for platform in exported.platforms]
    allowed = frozenset.intersection(*of_each) if of_each else frozenset()
    found = {next(filter(None, call), "") for call in _CALL.findall(exported.mlir_module())} - allowed
    if found:
        needs = "call only " + ", ".join(sorted(allowed)) if allowed else "call nothing outside of itself"
        raise BundleError(
            f"program {variant}: its export calls {', '.join(sorted(found))}; must {needs}; do not use this bundle: no build "
            "of rpac makes such a program; build it again from its spec"
        )
