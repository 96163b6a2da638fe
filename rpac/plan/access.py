"""How kernels read K and V from the cache and write new tokens to it: what follows from a spec alone."""

from __future__ import annotations

from typing import Final

from rpac.contract.arrays import LANES, head_lanes, joins_rows, packing
from rpac.plan.query_rows import Sets
from rpac.plan.recipe import DecodeMask, KvMatmul, Read, Write
from rpac.spec import Spec

INT8_MXU: Final = ("v6e", "v5p", "v5e")  # targets whose MXU takes 8-bit integers
MOST_ALL_HEADS_ROWS: Final = 40  # with 64, 64 x 4096 takes 394 us on TPU7x, by blocks 377
MOST_OWN_ROWS: Final = 128  # of which scores of one KV head's set are kept


def read_of(spec: Spec) -> Read:
    """How a kernel takes one head's K and V out of the cache.

    Where they are interleaved and narrower than 32 bits, they share words. Words are split by rows where they hold other
    rows than one K and its V.
    """
    model = spec.model
    if spec.serving.kv_layout == "separate":
        return "separate"
    if packing(model.kv_dtype) == 1:
        return "strided"
    return "split_rows" if joins_rows(model) or model.quantized else "split_words"


def kv_matmul_options(spec: Spec, target: str) -> tuple[KvMatmul, ...]:
    """How a decode kernel may multiply rows with K and V, the rule's way first.

    The MXU of every target multiplies rows of bfloat16 with 8-bit floats, which takes half of the pushes that bfloat16
    takes. With 8-bit integers it multiplies only rows of 8-bit integers, and not on all targets.
    """
    model = spec.model
    if not model.quantized:
        return ("as_stored",)
    if model.q_dtype != "bfloat16":
        return ("converted",)
    if model.kv_dtype != "int8":
        return "as_stored", "converted"
    return ("int8_parts", "converted") if target in INT8_MXU else ("converted",)


def reads_all_heads(spec: Spec) -> bool:
    """Whether a decode kernel can take interleaved K and V of all heads as they lie, and gains by it.

    Each word must hold a K and its V, or each row of registers both. A head must be a row of registers; or two, of 16 bits, if
    scores of one KV head's set are kept. Query rows cost work in proportion to the bytes that are fetched beside it. With more
    than `MOST_OWN_ROWS`, the MXU would take longer than the fetch; where all rows of scores are kept, the vector unit would
    with more than `MOST_ALL_HEADS_ROWS`.
    """
    model = spec.model
    sets, pack = Sets.of(spec, "all_heads"), packing(model.kv_dtype)
    of_words = pack > 1 if head_lanes(model) == LANES else pack == 2 and sets.keeps_own
    most = MOST_OWN_ROWS if sets.keeps_own else MOST_ALL_HEADS_ROWS
    rows = model.q_heads * spec.serving.decode_len * sets.halves
    return spec.serving.kv_layout == "interleaved" and of_words and rows <= most


def write_of(spec: Spec) -> Write:
    """How a kernel puts new tokens into the cache's rows."""
    model = spec.model
    if not model.update_cache:
        return "none"
    if spec.serving.kv_layout == "separate":
        return "bytes" if model.quantized else "halves" if packing(model.kv_dtype) > 1 else "words"
    if model.quantized:
        return "packed_bytes"
    if joins_rows(model):
        return "packed_joined"
    return "packed_halves" if packing(model.kv_dtype) > 1 else "packed_words"


def decode_mask_of(spec: Spec) -> DecodeMask:
    """What hides a score from a decode row's query."""
    if spec.serving.tree_mask:
        return "tree"
    return "drafts" if spec.serving.decode_len > 1 else "lengths"
