"""How text of a spec or a plan gets into a source: through these functions alone, so that none of it is ever code."""

from __future__ import annotations

from typing import Final

from rpac.contract.arrays import BITS

_DTYPES: Final = {*BITS, "uint32"}


def prose(text: object) -> str:
    """Text in a docstring or a comment: one line of ASCII without quotes or backslashes of its own.

    Such characters are escaped, so that the docstring holds the text as it was given.
    """
    return "".join(char if " " <= char <= "~" and char not in '"\\' else _escaped(char) for char in str(text))


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def dtype_name(name: str) -> str:
    """The name of a dtype, which may be code. Raises ValueError for any other text."""
    if name not in _DTYPES:
        raise ValueError(f"found {name!r}; must be one of the dtypes {', '.join(sorted(_DTYPES))}")
    return name


def dtype(name: str) -> str:
    """The expression of a dtype. Raises ValueError as `dtype_name`."""
    return f"jnp.{dtype_name(name)}"
