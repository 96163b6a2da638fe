"""Arrays of new tokens that XLA lays out by head: a kernel that takes them so needs no copy before or after it."""

from __future__ import annotations

from typing import Final

from rpac.contract.arrays import SUBLANES, arg_specs, packing
from rpac.spec import Spec

SORTED_TOKENS: Final = 16  # tokens whose heads are sorted at once: whole sublane tiles of any dtype of these arrays


def laid_out_by_head(spec: Spec) -> tuple[str, ...]:
    """The arguments among `queries`, `keys` and `values` that XLA keeps as `[heads, tokens, head_dim]`."""
    taken = ("queries", "keys", "values") if spec.model.update_cache else ("queries",)
    return tuple(
        dims.name
        for dims in arg_specs(spec, 0)
        if dims.name in taken and not fills_sublane_tiles(dims.shape[1], dims.dtype)
    )


def fills_sublane_tiles(heads: int, dtype: str) -> bool:
    """Whether the heads of a token are whole sublane tiles, which may be short. XLA keeps `[tokens, heads, head_dim]` in that
    order if they are, and has the heads outermost if they are not, where padding would be among them.
    """
    return heads % SUBLANES == 0 or (SUBLANES % heads == 0 and heads >= packing(dtype))
