"""The recipe of a kernel: the decisions that choose its code, made once, from a spec, a target and tiles.

A skeleton and the parts that fill it are chosen by these words; a kernel's header and `rpac plan` are written from them
(`rpac.plan.words`), and `rpac tune` varies those that tiles leave open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

Read = Literal[
    "separate", "token_pairs", "split_words", "split_rows", "strided", "all_heads", "latent", "latent_staged"
]
"""How a kernel takes K and V out of the cache: those of one head at a time, or of all heads."""
Write = Literal[
    "none", "bytes", "halves", "words", "packed_bytes", "packed_joined", "packed_halves", "packed_words", "latent"
]
"""How new tokens get into the cache's rows."""
KvMatmul = Literal["as_stored", "int8_parts", "converted"]
"""How K and V of the cache go into matmuls with rows of queries and of probabilities."""
Fetch = Literal["before", "between"]
"""Where an iteration of a decode kernel starts its fetches: before it computes tiles, or in between."""
DecodeMask = Literal["lengths", "drafts", "tree"]
"""What hides a score in a decode row: the sequence's end, or the place of a draft among the new tokens."""
BlockMask = Literal["compare", "matmul", "lengths"]
"""What hides a score in a block of queries."""
QueryOrder = Literal["transpose", "strided", "by_head", "by_lane", "none"]
"""How queries are sorted by KV head: those that come by head, or with tokens along lanes, are so already."""
Scores = Literal["rows", "transposed"]
"""How scores lie: `[query rows, tokens]`, or transposed."""

PageTable = Literal["smem", "hbm"]
"""Where kernels have the page tables: whole in SMEM, or in HBM, from where they fetch parts ahead of the pages."""

SPLIT: Final[tuple[Read, ...]] = ("split_words", "split_rows")
"""The ways to read K and V that share 32-bit words, which a kernel splits before the MXU can take either."""

Option = TypeVar("Option", bound="str | bool")
Wanted = Mapping[str, "str | bool"]
"""Decisions of one kernel that are not left to the rule, by name: those of `BLOCK_OPTIONS` or `DECODE_OPTIONS`."""
DECODE_OPTIONS: Final = ("read", "kv_matmul", "fetch")
BLOCK_OPTIONS: Final = ("scores", "paced", "mask", "pipelined")
PROGRAM_OPTIONS: Final = ("page_table",)
"""The decisions for which some tiles leave more than one option; in this order each may depend on those before it."""


@dataclass(frozen=True)
class SoftmaxPacing:
    """How probabilities wait for scores that the MXU makes meanwhile, so that the compiler does not make and spill them early.

    The scores of `slots` steps are kept, made `tokens` tokens at a time. Probabilities wait for the `wait_for`-th last
    scores that are made: in full tiles, and on the diagonal.
    """

    slots: int
    tokens: int
    wait_for: tuple[int, int]


@dataclass(frozen=True)
class DecodeRecipe:
    """`skeleton`: blocks of one sequence, or waves of tiles of any. `mask`: what hides a score from a row's query.

    `kv_matmul`: the MXU takes K and V as they are stored, or after a conversion to the queries' dtype; or it takes 8-bit
    integers as they are, beside rows that are split into parts of 8 bits. `fetch`: before tiles are computed, or in between.
    """

    skeleton: Literal["blocks", "waves"]
    read: Read
    write: Write
    mask: DecodeMask
    kv_matmul: KvMatmul
    fetch: Fetch = "before"

    @property
    def splits_words(self) -> bool:
        """Whether K and V share 32-bit words that the kernel splits."""
        return self.read in SPLIT


@dataclass(frozen=True)
class BlockRecipe:
    """The decisions of a prefill or mixed kernel.

    `scores`: `[query rows, tokens]`, or transposed. `lookahead`: flash steps whose scores are made before their
    probabilities, in full tiles and on the diagonal. `pacing`: of paced softmax. `mask`: by comparing positions of tokens
    and queries, in the matmul beside the keys, or by the sequence's length alone. `query_order`: how queries are sorted by
    KV head, by transposing registers of `transposed_heads` heads, by strided loads and stores, or not, where they come by head
    or with tokens along lanes.
    `pipelined`: the last tile of a block makes the first scores of the next block. `sums`: on the vector unit, or by ones
    beside the values in MXU lanes to spare. `unpadded_values`: the MXU takes a head's own values and no padding.
    """

    skeleton: Literal["query_blocks", "latent"]
    read: Read
    write: Write
    scores: Scores = "rows"
    lookahead: tuple[int, int] = (0, 0)
    pacing: SoftmaxPacing | None = None
    mask: BlockMask = "compare"
    query_order: QueryOrder = "none"
    transposed_heads: int = 0
    pipelined: bool = False
    sums: Literal["vector", "matmul"] = "vector"
    unpadded_values: bool = False

    @property
    def paced(self) -> bool:
        """Whether probabilities wait for scores."""
        return self.pacing is not None

    @property
    def softmax(self) -> str:
        """`transposed`, `paced` or `plain`: the part that holds the flash steps."""
        return "transposed" if self.scores == "transposed" else "paced" if self.pacing else "plain"

    @property
    def sink_order(self) -> str:
        """How sinks lie beside rows of queries."""
        return "by_lane" if self.query_order == "by_lane" else self.scores

    @property
    def splits_words(self) -> bool:
        """Whether K and V share 32-bit words that the kernel splits."""
        return self.read in SPLIT


@dataclass(frozen=True)
class Recipe:
    """What the source of a plan is made of; None for a kernel that is not in it, and in a portable program.

    `features` are those that kernels have code for, by key: `causal` and `update_cache` are among them unless a spec turns
    them off. `page_table`: where all kernels of the source have the page tables. `by_head`: the arguments that kernels take as
    `[heads, tokens, head_dim]`; the output goes with `queries`.
    """

    features: tuple[str, ...]
    decode: DecodeRecipe | None = None
    block: BlockRecipe | None = None
    page_table: PageTable = "smem"
    by_head: tuple[str, ...] = ()

    @property
    def queries_by_lane(self) -> bool:
        """Whether kernels take queries as `[heads, head_dim, tokens]`, and leave the output so."""
        return self.block is not None and self.block.query_order == "by_lane"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `asdict`, by way of JSON too."""
        decode, block = data["decode"], data["block"]
        if block is not None:
            pacing = block["pacing"] and SoftmaxPacing(
                **{**block["pacing"], "wait_for": tuple(block["pacing"]["wait_for"])}
            )
            block = BlockRecipe(**{**block, "lookahead": tuple(block["lookahead"]), "pacing": pacing})
        return cls(
            tuple(data["features"]),
            decode and DecodeRecipe(**decode),
            block,
            data["page_table"],
            tuple(data["by_head"]),
        )


@dataclass
class Chooser:
    """Takes each decision for one kernel: as `wanted`, or else the rule's, which is the first option.

    `legal` has the options of every decision that was taken. `target` is that of the kernel.
    """

    target: str
    wanted: Wanted = field(default_factory=dict)
    legal: dict[str, tuple[str | bool, ...]] = field(default_factory=dict)

    def choose(self, name: str, *options: Option) -> Option:
        """One of the options that the tiles allow. Raises ValueError where another one is wanted."""
        self.legal[name] = options
        value = self.wanted.get(name, options[0])
        for option in options:
            if option is value or (type(option) is str and option == value):
                return option
        raise ValueError(
            f"recipe: {name}: found {value!r}; with these tiles it must be {' or '.join(map(repr, options))}"
        )
