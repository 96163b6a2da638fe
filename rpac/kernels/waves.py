"""What the template of a decode kernel by waves of tiles shows where K and V lie separately."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rpac.kernels.assemble import Kernel
from rpac.kernels.constants import Constant, tile
from rpac.kernels.semaphores import WAVE_SHAPES
from rpac.kernels.shared import Shared, call_of, model_constants, query_row_shapes, scratch_of
from rpac.plan import DecodeWaves, KernelPlan
from rpac.plan.buffers import sublane_tile_tokens
from rpac.plan.query_rows import Sets, sublane_tiles_by_sequence
from rpac.plan.recipe import DecodeRecipe, Recipe
from rpac.spec import Spec

NAMES = {"unit_out": "new_out", "unit_sem": "write_sem"}  # of scratch arrays, other than in the plan
LOADS_OF_NEW = (("q_hbm", "q_in"), ("k_hbm", "new_keys"), ("v_hbm", "new_values"))


@dataclass(frozen=True)
class Queries:
    """How the queries of a sequence lie in registers.

    `heads`: the rows of a matmul are those of one KV head, or shared by several. `padding`: there are rows of no query at the
    end of each head's, at the end of the last ones, or nowhere. `pairs`: two tokens share a row of K, and of V.
    """

    heads: Literal["own", "shared"]
    padding: Literal["none", "last", "each"]
    pairs: bool

    @classmethod
    def of(cls, spec: Spec, recipe: Recipe) -> Queries:
        """Those of a spec."""
        sets = Sets.of(spec)
        shared = sets.heads > 1
        padding: Literal["last", "each"] = "last" if shared else "each"
        return cls(
            heads="shared" if shared else "own",
            padding=padding if sets.padded(spec.model) else "none",
            pairs=recipe.decode is not None and recipe.decode.read == "token_pairs",
        )

    def drop(self, rows: str) -> str:
        """Rows of queries without padding."""
        return rows if self.padding == "none" else f"without_padding({rows})"

    def by_half(self, p: str) -> str:
        """Probabilities as the rows of matmuls with values."""
        return f"p_by_half({p})" if self.pairs else p


def decode_waves(spec: Spec, plan: KernelPlan, recipe: Recipe) -> Kernel:
    """The kernel of a plan."""
    tiles = plan.decode
    assert isinstance(tiles, DecodeWaves) and recipe.decode is not None
    constants = [*model_constants(spec, plan), *wave_constants(spec, tiles), *_own_constants(spec, recipe)]
    context = {
        "kernel_class": "DecodeKernel",
        "call": call_of(spec, "decode"),
        "scratch": scratch_of(tiles.scratch(spec, plan.recipe), _shapes(spec), constants, NAMES),
        "summary": _summary(spec),
        "patches": _patches(spec),
        "loads": LOADS_OF_NEW if spec.model.update_cache else LOADS_OF_NEW[:1],
        "queries": Queries.of(spec, recipe),
        "value_lanes": "HEAD_LANES",
        "store": Shared.of(spec, recipe).new_tokens,
        "write": f"wave_write/{recipe.decode.write}",
        "attention": "grouped",
        "order": _order(recipe.decode),
        "tiles_fit": _tiles_fit(spec, tiles),
    }
    return Kernel("skeletons/decode_waves.py.jinja", context, constants, "DECODE_")


def _order(recipe: DecodeRecipe) -> str:
    """The part that computes the tiles of a wave."""
    if recipe.read == "token_pairs":
        return "values_first"
    return "fetch_between" if recipe.fetch == "between" else "one_by_one"


def _summary(spec: Spec) -> str:
    several = spec.serving.decode_len > 1
    new = "DECODE_LEN new tokens" if several else "One new token"
    updated = f"update its page{'s' * several}, " if spec.model.update_cache else ""
    return f"{new} for each of the sequences [0, distribution[0]): {updated}attend to all tokens that it sees."


def _patches(spec: Spec) -> str:
    if not spec.model.update_cache:
        return "clears what lies behind a sequence's tokens"
    if spec.serving.decode_len > 1:
        return "stores the new tokens and clears what lies behind them"
    return "stores the new token and clears what lies behind it"


def wave_constants(spec: Spec, tiles: DecodeWaves) -> list[Constant]:
    """The constants of a plan's waves."""
    serving = spec.serving
    several = serving.decode_len > 1
    return [
        tile("TILE", tiles.tile, "tokens that are fetched and computed at once, of one sequence"),
        tile("TILES_PER_WAVE", tiles.tiles_per_wave, "which fill the waits of each other"),
        tile("LOOKAHEAD", tiles.lookahead, "waves from the fetch of one to its softmax"),
        tile("WAVE_TOKENS", "TILES_PER_WAVE * TILE"),
        tile("WAVE_BUFFERS", "LOOKAHEAD + 1", "waves that are fetched or computed"),
        tile("TILE_BUFFERS", "WAVE_BUFFERS * TILES_PER_WAVE"),
        tile("TILE_PAGES", "TILE // PAGE_SIZE"),
        tile("MAX_ROWS", tiles.max_rows, "sequences of the largest batch"),
        tile("NO_SEQ", "MAX_ROWS", "in place of a sequence where there is no tile"),
        tile("MAX_TOKENS", "MAX_ROWS * DECODE_LEN" if several else "MAX_ROWS", "new tokens of the largest batch"),
        tile("WRITE_BUFFERS", tiles.write_buffers, "sequences whose new tokens are on their way to the cache"),
        tile("TILES_LOADED", tiles.tiles_loaded(spec), "whose loads may be early: those after them wait for the MXU"),
        tile("LAST_ENTRY", "MAX_SEQS * PAGES_PER_SEQ - 1", "of the page tables"),
    ]


def _own_constants(spec: Spec, recipe: Recipe) -> list[Constant]:
    """Those of heads, and of new tokens in the cache."""
    sets, updates = Sets.of(spec), spec.model.update_cache
    pairs = recipe.decode is not None and recipe.decode.read == "token_pairs"
    new_tiles = sublane_tiles_by_sequence(spec, 1, sublane_tile_tokens(spec.model))[-1]
    return [
        tile("QUERIES", "Q_HEADS * DECODE_LEN" if spec.serving.decode_len > 1 else "Q_HEADS", "of a sequence"),
        tile("HEADS_PER_SET", sets.heads, "KV heads whose queries are the rows of one matmul: they fill a register"),
        tile("HEAD_SETS", sets.count),
        tile("SET_QUERIES", sets.heads * sets.queries),
        tile("SET_ROWS", sets.rows, "rows of these queries, whole registers"),
        tile("P_ROWS", "2 * SET_ROWS" if pairs else "SET_ROWS", "rows of a set's probabilities in one matmul"),
        tile("HEAD_QUERY_ROWS", sets.rows // sets.heads, "of them those of one KV head"),
        tile("QUERY_ROWS", "HEAD_SETS * SET_ROWS"),
        tile("PAIR_WORDS", "TILE // (2 * PACKING)", "words of the rows of half a tile"),
        tile("NEW_TILES", new_tiles, "sublane tiles that a sequence's new tokens may lie in"),
        tile("LOADS", 3 if updates else 1, "queries, keys, values" if updates else "queries"),
    ]


def _shapes(spec: Spec) -> dict[str, str]:
    """The shapes of scratch arrays, in constants."""
    several = spec.serving.decode_len > 1
    rows = "(MAX_ROWS + 1) * DECODE_LEN" if several else "MAX_ROWS + 1"
    return {
        "kv": "TILE_BUFFERS, TILE_PAGES, KV_PLANES, KV_HEADS, PAGE_SIZE, HEAD_LANES",
        "q_in": f"{rows}, Q_HEADS, HEAD_DIM",
        "new_keys": "MAX_TOKENS, KV_HEADS, HEAD_DIM",
        "new_values": "MAX_TOKENS, KV_HEADS, HEAD_DIM",
        "unit_out": f"WRITE_BUFFERS, {'NEW_TILES, ' * several}KV_PLANES, KV_HEADS, SUBLANE_TILE, HEAD_LANES",
        "kv_swapped": "TILES_PER_WAVE, KV_HEADS, PAIR_WORDS, HEAD_LANES",
        "scores": "TILES_PER_WAVE, QUERY_ROWS, TILE",
        **query_row_shapes("QUERY_ROWS"),
        "row_max": "QUERY_ROWS, LANES",
        "row_sum": "QUERY_ROWS, LANES",
        "acc": "QUERY_ROWS, HEAD_LANES",
        "out_all": f"{rows}, Q_HEADS, HEAD_DIM",
        "lse_rows": f"{rows}, PADDED_Q_HEADS, LANES",
        **WAVE_SHAPES,
        "lse_sem": "1",
    }


def _tiles_fit(spec: Spec, tiles: DecodeWaves) -> bool:
    """Whether no tile reaches past the end of a sequence's page table: a window begins at any page, and so do its tiles."""
    model = spec.model
    whole = math.gcd(model.attention_chunk or 0, spec.serving.max_model_len) % tiles.tile == 0
    return model.sliding_window is None and whole
