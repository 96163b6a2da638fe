"""Portable programs, for XLA: their tiles, which are the same for all batches of a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rpac.contract.arrays import LANES, nbytes
from rpac.plan.buffers import RowDims
from rpac.plan.sizes import MIB
from rpac.spec import Spec

DECODE_BLOCK: Final = 128  # these two: fastest of those timed on two CPU cores, by small margins
STEP_BYTES: Final = MIB
LATENT_ROWS: Final = 2048  # query rows of a step of latent attention


@dataclass(frozen=True)
class XlaTiles:
    """Tiles of a portable program: `block` tokens of KV a step; `blocks` of them (decode), or `q_block` queries."""

    block: int
    blocks: int = 1
    q_block: int = 1


def tiles_of(spec: Spec, kind: str) -> tuple[XlaTiles, XlaTiles]:
    """The tiles of a program's decode rows, and of its other rows."""
    page = spec.serving.page_size
    if spec.model.rope_dim is not None:
        q_block = max(LATENT_ROWS // spec.model.q_heads, 1)
        return XlaTiles(block=max(page, LANES), blocks=4), XlaTiles(block=max(page, 256), q_block=q_block)
    token_bytes = nbytes((RowDims.of(spec.model).token_rows, LANES), spec.model.kv_dtype)
    size = max(page, DECODE_BLOCK)
    blocks = min(max(STEP_BYTES // (size * token_bytes), 1), 16)
    decode = XlaTiles(block=size, blocks=blocks)
    block = XlaTiles(block=max(page, 256), q_block=128) if kind == "prefill" else XlaTiles(max(page, 512), q_block=32)
    return decode, block
