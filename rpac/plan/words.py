"""A plan in words: its tiles, and the decisions of its recipe, each with the reason. `rpac plan` and `rpac report` show them,
and a kernel's header has the decisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from rpac.plan.decode_blocks import DecodeBlocks
from rpac.plan.decode_waves import DecodeWaves
from rpac.plan.latent import LatentBlockTiles
from rpac.plan.portable import XlaTiles
from rpac.plan.prefill import BlockTiles
from rpac.plan.recipe import BlockRecipe, DecodeRecipe, Recipe


@dataclass(frozen=True)
class Decision:
    """One decision of a recipe; `kernel` is `decode`, or the kind of a kernel of query blocks, or of all kernels, empty."""

    kernel: str
    name: str
    choice: str
    why: str

    def __str__(self) -> str:
        where = f"{self.kernel}, " if self.kernel else ""
        return f"{where}{self.name}: {self.choice}; {self.why}"


class Words(NamedTuple):
    """What a value means, as a format of the kernel's recipe, and why it was chosen."""

    choice: str
    why: str


TITLES: Final[Mapping[str, str]] = {
    "skeleton": "loop",
    "read": "reading K and V",
    "write": "writing new tokens",
    "mask": "mask",
    "kv_matmul": "matmuls with K and V",
    "fetch": "starting fetches",
    "scores": "scores",
    "softmax": "softmax",
    "lookahead": "lookahead",
    "query_order": "sorting queries",
    "pipelined": "between blocks",
    "sums": "sums of probabilities",
    "unpadded_values": "values",
}
"""The decisions by the names of their fields, in the order in which they are told."""

_READ: Final[Mapping[str | bool, Words]] = {
    "separate": Words(
        "as they lie in the cache, one array for K and one for V of each head",
        "kv_layout separate needs no shuffle before the MXU",
    ),
    "token_pairs": Words(
        "a token of each half of a tile share a row of K, and one of V",
        "a row of the cache holds K and V of one token; with pairs half as many rows go through the MXU",
    ),
    "split_words": Words(
        "32-bit words are split into K and V",
        "interleaved K and V narrower than 32 bits share words, which the MXU cannot take",
    ),
    "split_rows": Words(
        "32-bit words are split into the rows that they hold",
        "each word holds other rows than one K and its V, because the elements have 8 bits or K and V share a row",
    ),
    "strided": Words(
        "by strided loads", "elements of 32 bits share no words, so that one row in several is K of one head"
    ),
    "all_heads": Words(
        "all heads at once, in the order of the cache; 32-bit words are split into K and V in registers",
        "a mask leaves each query the scores of its own KV head, so that no row has to be moved or stored",
    ),
    "latent": Words(
        "one row of a token for all query heads", "the latent vector is part of every key and is every value"
    ),
    "latent_staged": Words(
        "one row of a token for all query heads; latent vectors are transposed before the MXU takes them as keys",
        "that takes the MXU half the time; a tile goes through stages, so that no stage waits for another",
    ),
}
_WRITE: Final[Mapping[str | bool, Words]] = {
    "none": Words("not at all", "the spec says update_cache: false, so the cache has them already"),
    "bytes": Words("single bytes of a sublane tile", "8-bit elements of several tokens share a word"),
    "halves": Words("halves of the words of a sublane tile", "16-bit elements of two tokens share a word"),
    "words": Words("whole words of a sublane tile", "32-bit elements of different tokens share nothing"),
    "packed_bytes": Words("packed into words of four bytes", "8-bit K and V of one token share words"),
    "packed_joined": Words(
        "K and V side by side in a row, packed into words", "K and V of a head fill one row of 128 lanes"
    ),
    "packed_halves": Words("K and V of one token packed into the halves of words", "16-bit K and V are interleaved"),
    "packed_words": Words("K and V alternate, a row each", "32-bit elements need no packing"),
    "latent": Words("latent vector and rotary key in one row", "that is how latent attention stores a token"),
}

_BY_HEAD: Final = (
    "XLA keeps arrays so where the heads of a token fill no sublane tiles; then nothing is copied around a kernel"
)

DECODE: Final[Mapping[str, Mapping[str | bool, Words]]] = {
    "skeleton": {
        "blocks": Words(
            "blocks of one sequence",
            "waves of interleaved tiles would spill registers, with words split one head at a time",
        ),
        "waves": Words("waves of tiles of any sequences", "tiles of short sequences hide each other's latency"),
    },
    "read": _READ,
    "write": _WRITE,
    "mask": {
        "lengths": Words("by the length of each sequence", "a row has one new token, the last of its sequence"),
        "drafts": Words("by the place of each draft, too", "a draft sees the drafts before it"),
        "tree": Words("by the argument `tree`, too", "it says which drafts a draft sees"),
    },
    "fetch": {
        "before": Words("before an iteration's matmuls", "then no fetch waits for a matmul"),
        "between": Words(
            "between the tiles of a wave",
            "their scalar instructions take no time where the MXU takes K and V meanwhile",
        ),
    },
    "kv_matmul": {
        "as_stored": Words("as they are stored", "the MXU takes elements of this dtype beside the rows"),
        "int8_parts": Words(
            "as they are stored, with rows split into three parts of 8 bits",
            "the MXU takes 8-bit integers beside 8-bit integers only; rows are few, and K and V are many",
        ),
        "converted": Words(
            "converted to the dtype of the queries",
            "here the MXU does not take the stored dtype beside rows of that dtype",
        ),
    },
}
"""Of decode kernels: what each value of each field means."""

BLOCK: Final[Mapping[str, Mapping[str | bool, Words]]] = {
    "skeleton": {
        "query_blocks": Words(
            "blocks of queries over blocks of tokens", "a fetched token serves all queries of a block"
        ),
        "latent": Words("blocks of queries with all their heads", "all heads read the same row of a token"),
    },
    "read": _READ,
    "write": _WRITE,
    "scores": {
        "rows": Words("a row for each query", "this needs neither MXU lanes to spare nor whole registers of rows"),
        "transposed": Words("a column for each query", "queries fill the width of the MXU, which a head does not"),
    },
    "softmax": {
        "plain": Words("not paced", "this needs no buffers but those of the lookahead, and steps of any length"),
        "paced": Words(
            "waits for the scores of later steps, {0.pacing.slots} steps' scores kept",
            "otherwise the compiler would make probabilities early and spill them",
        ),
        "transposed": Words(
            "waits for the scores of later steps, {0.pacing.slots} steps' scores kept",
            "otherwise the compiler would make probabilities early and spill them",
        ),
    },
    "lookahead": {
        True: Words(
            "steps from a score to its probability: {0.lookahead[0]} in full tiles, {0.lookahead[1]} on the diagonal",
            "the MXU works while the vector unit does softmax",
        ),
        False: Words("none", "a step has the rows of all heads, which keep the MXU busy"),
    },
    "mask": {
        "compare": Words("by comparing positions", "this works with any mask and needs no MXU lanes"),
        "matmul": Words("in the matmul, beside the keys", "MXU lanes to spare add it to the scores at no cost"),
        "lengths": Words("by the length of each sequence", "attention is not causal"),
    },
    "query_order": {
        "transpose": Words(
            "by transposing parts of registers, {0.transposed_heads} KV heads at a time",
            "the queries of a token for these heads fill one register",
        ),
        "strided": Words(
            "by strided loads and stores", "the queries of a token for a KV head are no whole part of a register"
        ),
        "by_head": Words("not at all", "XLA keeps them by head, and so the kernel takes them"),
        "by_lane": Words("not at all", "XLA keeps heads of half a row with tokens along lanes, as the MXU takes them"),
        "none": Words("not at all", "all query heads read the same row of a token"),
    },
    "pipelined": {
        True: Words("the last tile of a block makes the first scores of the next block", "the MXU does not wait there"),
        False: Words(
            "each block makes its own first scores", "other tiles, or the splitting of words, may come between"
        ),
    },
    "sums": {
        "vector": Words("on the vector unit", "this needs no MXU lanes"),
        "matmul": Words("by ones beside the values", "MXU lanes to spare add them at no cost"),
    },
    "unpadded_values": {
        True: Words(
            "a head's own values, without padding", "they are whole registers of rows, and the MXU takes fewer"
        ),
        False: Words("whole registers of lanes", "the MXU takes them as they lie in the cache"),
    },
}
"""Of prefill and mixed kernels: what each value of each field means."""


_PAGE_TABLE: Final[Mapping[str, Words]] = {
    "smem": Words("in SMEM", "the tables of all sequences fit there, where a page id is one load away"),
    "hbm": Words(
        "in HBM; parts of it come to SMEM ahead of the pages", "the tables of all sequences need not fit SMEM then"
    ),
}


def tiles_in_words(tiles: DecodeBlocks | DecodeWaves | BlockTiles | LatentBlockTiles | XlaTiles | None) -> str:
    """Tiles in tokens. Decode: block x buffers or, with separate K/V, tiles per wave x tile x waves. Prefill and mixed:
    queries, then tokens fetched / computed at once x buffers.
    """
    match tiles:
        case None:
            return "-"
        case DecodeBlocks():
            return f"{tiles.block} x{tiles.buffers}"
        case DecodeWaves():
            return f"{tiles.tiles_per_wave} x {tiles.tile} x{tiles.wave_buffers}"
        case BlockTiles():
            return f"{tiles.q_block} q, {tiles.block}/{tiles.tile} x{tiles.buffers}"
        case LatentBlockTiles():
            return f"{tiles.q_block} q, {tiles.block} x{tiles.buffers}"
        case XlaTiles():
            return f"{tiles.q_block} q, {tiles.block}" if tiles.q_block > 1 else f"{tiles.block} x{tiles.blocks}"


def decisions(recipe: Recipe, kind: str) -> Iterator[Decision]:
    """The decisions of a program of a kind, each once."""
    features = ", ".join(recipe.features) or "none"
    yield Decision("", "features", features, "the spec asks for them; no other feature is in the code")
    if recipe.decode is not None or recipe.block is not None:
        yield Decision("", "page tables", *_PAGE_TABLE[recipe.page_table])
    if recipe.by_head:
        yield Decision("", "arrays by head", ", ".join(recipe.by_head), _BY_HEAD)
    for kernel, of_kernel, table in (("decode", recipe.decode, DECODE), (kind, recipe.block, BLOCK)):
        if of_kernel is not None:
            yield from _of_kernel(kernel, of_kernel, table)


def _of_kernel(
    kernel: str, recipe: DecodeRecipe | BlockRecipe, table: Mapping[str, Mapping[str | bool, Words]]
) -> Iterator[Decision]:
    for name, title in TITLES.items():
        if name in table:
            value = getattr(recipe, name)
            words = table[name][value[0] > 0 if isinstance(value, tuple) else value]
            yield Decision(kernel, title, words.choice.format(recipe), words.why)
