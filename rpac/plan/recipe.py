"""The recipe of a kernel: the decisions that choose its code, made once, from a spec, a target and tiles.

A skeleton and the parts that fill it are chosen by these words, a kernel's header and `rpac plan` are written from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Read = Literal["separate", "token_pairs", "split_words", "split_rows", "strided", "latent"]
"""How a kernel takes one head's K and V out of the cache."""
Write = Literal[
    "none", "bytes", "halves", "words", "packed_bytes", "packed_joined", "packed_halves", "packed_words", "latent"
]
"""How new tokens get into the cache's rows."""
DecodeMask = Literal["lengths", "drafts", "tree"]
"""What hides a score in a decode row: the sequence's end, or the place of a draft among the new tokens."""


@dataclass(frozen=True)
class SoftmaxPacing:
    """How probabilities wait for scores that the MXU makes meanwhile, so that the compiler does not make and spill them early.

    The scores of `slots` steps are kept, made `tokens` tokens at a time, `lookahead` steps before they are used: in full
    tiles, and on the diagonal. Probabilities wait for the `wait_for`-th last scores that are made, in either.
    """

    slots: int
    tokens: int
    lookahead: tuple[int, int]
    wait_for: tuple[int, int]


@dataclass(frozen=True)
class DecodeRecipe:
    """`skeleton`: blocks of one sequence, or waves of tiles of any. `mask`: what hides a score from a row's query."""

    skeleton: Literal["blocks", "waves"]
    read: Read
    write: Write
    mask: DecodeMask


@dataclass(frozen=True)
class BlockRecipe:
    """The decisions of a prefill or mixed kernel.

    `scores`: `[query rows, tokens]`, or transposed. `mask`: by comparing positions of tokens and queries, in the matmul
    beside the keys, or by the sequence's length alone. `query_order`: how queries are sorted by KV head, by transposing
    registers of `transposed_heads` heads or by strided loads and stores. `pipelined`: the last tile of a block makes the
    first scores of the next block. `sums`: on the vector unit, or by ones beside the values in MXU lanes to spare.
    `unpadded_values`: the MXU takes a head's own values and no padding.
    """

    skeleton: Literal["query_blocks", "latent"]
    read: Read
    write: Write
    scores: Literal["rows", "transposed"]
    pacing: SoftmaxPacing | None
    mask: Literal["compare", "matmul", "lengths"]
    query_order: Literal["transpose", "strided", "none"]
    transposed_heads: int
    pipelined: bool
    sums: Literal["vector", "matmul"]
    unpadded_values: bool

    @property
    def softmax(self) -> str:
        """`transposed`, `paced` or `plain`: the part that holds the flash steps."""
        return "transposed" if self.scores == "transposed" else "paced" if self.pacing else "plain"


@dataclass(frozen=True)
class Recipe:
    """What the source of a plan is made of; None for a kernel that is not in it. `features` are
    those that kernels have code for, by key: `causal` and `update_cache` are among them unless a spec turns them off."""

    features: tuple[str, ...]
    decode: DecodeRecipe | None
    block: BlockRecipe | None
