"""What the template of a decode kernel by waves of tiles shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rpac.contract.arrays import BITS, LANES, WORD_BITS, joins_rows
from rpac.contract.attention import Attention
from rpac.kernels.assemble import Kernel
from rpac.kernels.calls import call_of
from rpac.kernels.constants import Constant, tile
from rpac.kernels.model_constants import model_constants
from rpac.kernels.semaphores import WAVE_SHAPES
from rpac.kernels.shared import CLEARED_AT_ONCE, Shared, query_row_shapes, scratch_of
from rpac.plan import DecodeWaves, KernelPlan, RowDims
from rpac.plan.buffers import all_heads_rows, sublane_tile_tokens
from rpac.plan.by_head import SORTED_TOKENS
from rpac.plan.page_table import WaveWindows
from rpac.plan.query_rows import Sets, sublane_tiles_by_sequence
from rpac.plan.recipe import DecodeRecipe, Recipe
from rpac.spec import Spec

NAMES = {"unit_out": "new_out", "unit_sem": "write_sem"}  # of scratch arrays, other than in the plan
ORDERS = {"token_pairs": "values_first", "all_heads": "paced"}  # of the work of an iteration, by how K and V are read
ROWS_AT_ONCE = 64
PACKED_AT_ONCE = 8  # new tokens: as many hide each other's latencies
NEW_TOKENS = {  # an argument: its array in HBM, the one that the kernel reads, and the one in between if it comes by head
    "queries": ("q_hbm", "q_in", "q_by_head"),
    "keys": ("k_hbm", "new_keys", "k_by_head"),
    "values": ("v_hbm", "new_values", "v_by_head"),
}


@dataclass(frozen=True)
class Queries:
    """How the queries of a sequence lie in registers.

    `heads`: the rows of a matmul are those of one KV head, or shared by several. `padding`: there are rows of no query at the
    end of each head's, at the end of the last ones, or nowhere. `pairs`: two tokens share a row of K, and of V. `halves`: a
    head's lanes are two registers, and have rows each.
    """

    heads: Literal["own", "shared"]
    padding: Literal["none", "last", "each"]
    pairs: bool
    halves: bool = False

    @classmethod
    def of(cls, spec: Spec, recipe: Recipe) -> Queries:
        """Those of a spec."""
        assert recipe.decode is not None
        sets = Sets.of(spec, recipe.decode.read)
        shared = sets.heads > 1
        padding: Literal["last", "each"] = "last" if shared else "each"
        return cls(
            heads="shared" if shared else "own",
            padding=padding if sets.padded(spec.model) else "none",
            pairs=recipe.decode.read == "token_pairs",
            halves=sets.halves > 1,
        )

    def drop(self, rows: str) -> str:
        """Rows of queries without padding, of all lanes of a head."""
        if self.halves:
            rows = f"join_halves({rows})"
        return rows if self.padding == "none" else f"without_padding({rows})"

    def drop_of_register(self, rows: str) -> str:
        """The same of rows whose lanes all hold one value."""
        return f"{self.drop(rows)}[:, :LANES]" if self.halves else self.drop(rows)

    def each(self, rows: str) -> str:
        """The places of rows of queries, of all lanes."""
        return f"rows_of_halves({rows})" if self.halves else rows

    def by_half(self, p: str) -> str:
        """Probabilities as the rows of matmuls with values."""
        return f"p_by_half({p})" if self.pairs else p


def decode_waves(spec: Spec, plan: KernelPlan, recipe: Recipe) -> Kernel:
    """The kernel of a plan."""
    tiles = plan.decode
    assert isinstance(tiles, DecodeWaves) and recipe.decode is not None
    sets = Sets.of(spec, recipe.decode.read)
    constants = [*model_constants(spec, plan), *wave_constants(spec, tiles), *_own_constants(spec, tiles, recipe)]
    context = {
        "kernel_class": "DecodeKernel",
        "call": call_of(spec, "decode", plan.recipe),
        "scratch": scratch_of(tiles.scratch(spec, plan.recipe), _shapes(spec, tiles, recipe), constants, NAMES),
        "summary": _summary(spec),
        "patches": _patches(spec),
        "loads": _loads(spec, recipe),
        "sorted_arrays": [(by_head, by_token) for _, by_token, by_head in map(NEW_TOKENS.__getitem__, recipe.by_head)],
        "decode_tokens": "self.num_seqs * DECODE_LEN" if spec.serving.decode_len > 1 else "self.num_seqs",
        "queries": Queries.of(spec, recipe),
        "value_lanes": _value_lanes(recipe),
        "updates": _updates(spec, recipe),
        "attention": "all_heads" if recipe.decode.read == "all_heads" else "grouped",
        "columns": _columns(recipe),
        "score_rows": "own" if sets.keeps_own else "all",
        "score_lanes": "halves" if sets.halves > 1 else "whole",
        "write_buffers": "own" if tiles.writes_apart(spec) else "ring",
        "new_words": "ahead" if tiles.packs_ahead(spec) else "on_demand",
        "tile_rows": _tile_rows(spec.model),
        "order": _order(recipe.decode),
        "start": "scored" if tiles.first_steps(recipe) else "empty",
        "state": "carried",
        "ends": "at_once",
        "softmax": "masked_first" if recipe.decode.read == "all_heads" else "whole",
        "tiles_fit": _tiles_fit(spec, tiles),
        "window_begin": window_begin(spec, tiles),
    }
    return Kernel("skeletons/decode_waves.py.jinja", context, constants, "DECODE_")


def _loads(spec: Spec, recipe: Recipe) -> list[tuple[str, str, str]]:
    """What is copied at the start of a kernel: the function that does, from where, and to where."""
    loads = []
    for argument in ("queries", "keys", "values") if spec.model.update_cache else ("queries",):
        source, by_token, by_head = NEW_TOKENS[argument]
        copy = ("copy_by_head", source, by_head) if argument in recipe.by_head else ("copy_of_tokens", source, by_token)
        loads.append(copy)
    return loads


def _order(recipe: DecodeRecipe) -> str:
    """The part that computes the tiles of a wave."""
    if recipe.read == "all_heads":
        return "paced_between" if recipe.fetch == "between" else "paced"
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


def _updates(spec: Spec, recipe: Recipe) -> list[str]:
    """The parts that write new tokens to the cache."""
    assert recipe.decode is not None
    new_tokens = Shared.of(spec, recipe).new_tokens
    if spec.serving.kv_layout == "interleaved":
        return [f"packed_write/{new_tokens}"]
    return [f"wave_store/{new_tokens}", f"wave_write/{recipe.decode.write}"]


def _value_lanes(recipe: Recipe) -> str:
    """The lanes of a row of weighted values."""
    return "LANES" if recipe.decode is not None and recipe.decode.read == "all_heads" else "HEAD_LANES"


def _tile_rows(model: Attention) -> str:
    """Whether rows of all heads go into the MXU as they lie, or words of the cache are split first."""
    return "joined" if joins_rows(model) and model.kv_heads > 1 else "words"


def _pair_bits(model: Attention) -> int:
    """Bits of the integers whose lower bits are K, and those above V, or padding."""
    return WORD_BITS if model.kv_heads == 1 else 2 * BITS[model.kv_dtype]


def _columns(recipe: Recipe) -> str:
    """The scores of a query row in a tile."""
    return "COLUMNS" if recipe.decode is not None and recipe.decode.read == "all_heads" else "TILE"


def wave_constants(spec: Spec, tiles: DecodeWaves) -> list[Constant]:
    """The constants of a plan's waves."""
    serving = spec.serving
    several = serving.decode_len > 1
    windows = WaveWindows.of(spec, tiles.tile, tiles.tiles_per_wave, tiles.lookahead)
    return [
        tile("TILE", tiles.tile, "tokens that are fetched and computed at once, of one sequence"),
        tile("TILES_PER_WAVE", tiles.tiles_per_wave, "which fill the waits of each other"),
        tile("LOOKAHEAD", tiles.lookahead, "waves from the fetch of one to its softmax"),
        tile("WAVE_BUFFERS", "LOOKAHEAD + 1", "waves that are fetched or computed"),
        tile("TILE_BUFFERS", "WAVE_BUFFERS * TILES_PER_WAVE"),
        tile("TILE_PAGES", "TILE // PAGE_SIZE"),
        tile("MAX_ROWS", tiles.max_rows, "sequences of the largest batch"),
        tile(
            "PACKED_AT_ONCE", math.gcd(tiles.max_rows, PACKED_AT_ONCE), "sequences whose new tokens are packed at once"
        ),
        tile("ROWS_AT_ONCE", math.gcd(tiles.max_rows, ROWS_AT_ONCE), "sequences that a step of a loop over all takes"),
        tile("NO_SEQ", "MAX_ROWS", "in place of a sequence where there is no tile"),
        tile("MAX_TOKENS", "MAX_ROWS * DECODE_LEN" if several else "MAX_ROWS", "new tokens of the largest batch"),
        tile("WRITE_BUFFERS", tiles.write_buffers, "sequences whose new tokens are on their way to the cache"),
        tile("TILES_LOADED", tiles.tiles_loaded(spec), "whose loads may be early: those after them wait for the MXU"),
        tile("LAST_ENTRY", "MAX_SEQS * PAGES_PER_SEQ - 1", "of the page tables"),
        tile("WINDOW_ENTRIES", windows.entries, "of the page tables, fetched at once"),
        tile("TABLE_LOOKAHEAD", windows.lookahead, "waves from the fetch of page tables to that of their pages"),
        tile("TABLE_WAVES", windows.waves, "that have windows on their way, and more: a power of two"),
        tile("TABLE_WINDOWS", windows.windows, "in SMEM, of these waves and of those in flight: a power of two"),
    ]


def _own_constants(spec: Spec, tiles: DecodeWaves, recipe: Recipe) -> list[Constant]:
    """Those of heads, and of new tokens in the cache."""
    assert recipe.decode is not None
    sets, updates = Sets.of(spec, recipe.decode.read), spec.model.update_cache
    pairs = recipe.decode.read == "token_pairs"
    one_set = recipe.decode.read == "all_heads" and sets.count == 1
    query_rows = sets.queries if one_set else sets.rows // sets.heads
    apart = spec.serving.kv_layout == "separate"
    tile_tokens = sublane_tile_tokens(spec.model) if apart else RowDims.of(spec.model).sublane_tile
    new_tiles = sublane_tiles_by_sequence(spec, 1, tile_tokens)[-1]
    return [
        tile("QUERIES", "Q_HEADS * DECODE_LEN" if spec.serving.decode_len > 1 else "Q_HEADS", "of a sequence"),
        tile("HEADS_PER_SET", sets.heads, "KV heads whose queries are the rows of one matmul: they fill a register"),
        tile("HEAD_SETS", sets.count),
        tile("SET_QUERIES", sets.heads * sets.queries),
        tile("SET_ROWS", sets.rows, "rows of these queries, whole registers"),
        tile("P_ROWS", "2 * SET_ROWS" if pairs else "SET_ROWS", "rows of a set's probabilities in one matmul"),
        tile("HEAD_QUERY_ROWS", query_rows, "of them those of one KV head"),
        tile("ROW_SETS", "2 * HEAD_SETS" if sets.halves > 1 else "HEAD_SETS"),
        tile("QUERY_ROWS", "ROW_SETS * SET_ROWS"),
        tile("SCORE_SETS", sets.kept, "whose rows of scores are kept"),
        tile("SCORE_ROWS", "SCORE_SETS * SET_ROWS", "of them, for each row of K"),
        tile("NO_TOKEN", 1 << 30, "a number that no token of a sequence has"),
        tile(
            "VALUES_SHIFT", 0 if joins_rows(spec.model) else BITS[spec.model.kv_dtype], "bits of K in a pair of K and V"
        ),
        tile("ROW_DTYPE", f"jnp.int{BITS[spec.model.kv_dtype]}", "of as many bits as an element of the cache"),
        tile("PAIR_DTYPE", f"jnp.int{_pair_bits(spec.model)}", "of K and V; with one KV head, of all rows of a token"),
        tile("TOKEN_COLUMNS", all_heads_rows(spec.model), "rows of K of one token, all heads"),
        tile("HEAD_COLUMNS", sets.halves, "of them those of one head"),
        tile("COLUMNS", "TILE * TOKEN_COLUMNS", "rows of K, and of V, of all heads of a tile"),
        tile(
            "CLEARED_TILES",
            math.gcd(tiles.tile // RowDims.of(spec.model).sublane_tile, CLEARED_AT_ONCE),
            "sublane tiles that are cleared at once",
        ),
        tile("FIRST_TILES", tiles.first_tiles, "of the first wave, scored while the others are on their way"),
        tile("FIRST_STEPS", "TILES_PER_WAVE // FIRST_TILES"),
        tile("PAIR_WORDS", "TILE // (2 * PACKING)", "words of the rows of half a tile"),
        tile("NEW_TILES", new_tiles, "sublane tiles that a sequence's new tokens may lie in"),
        tile("SORTED_TOKENS", SORTED_TOKENS, "whose heads are sorted at once"),
        tile("LOADS", 3 if updates else 1, "queries, keys, values" if updates else "queries"),
    ]


def _shapes(spec: Spec, tiles: DecodeWaves, recipe: Recipe) -> dict[str, str]:
    """The shapes of scratch arrays, in constants."""
    several = spec.serving.decode_len > 1
    rows = "(MAX_ROWS + 1) * DECODE_LEN" if several else "MAX_ROWS + 1"
    new_tiles = "NEW_TILES, " * several
    if spec.serving.kv_layout == "interleaved":
        kv, new_out = "TILE_BUFFERS, TILE * TOKEN_ROWS, LANES", f"WRITE_BUFFERS, {new_tiles}SUBLANE_TILE_ROWS, LANES"
        packed = f"{'MAX_ROWS, ' if tiles.packs_ahead(spec) else ''}SUBLANE_TILE * WORD_ROWS, LANES"
    else:
        kv = "TILE_BUFFERS, TILE_PAGES, KV_PLANES, KV_HEADS, PAGE_SIZE, HEAD_LANES"
        packed = "MAX_ROWS, KV_PLANES, KV_HEADS, HEAD_LANES"
        new_out = f"WRITE_BUFFERS, {new_tiles}KV_PLANES, KV_HEADS, SUBLANE_TILE, HEAD_LANES"
    return {
        "kv": kv,
        "q_in": f"{rows}, Q_HEADS, HEAD_DIM",
        "q_by_head": "Q_HEADS, MAX_TOKENS, HEAD_DIM",
        "k_by_head": "KV_HEADS, MAX_TOKENS, HEAD_DIM",
        "v_by_head": "KV_HEADS, MAX_TOKENS, HEAD_DIM",
        "new_keys": "MAX_TOKENS, KV_HEADS, HEAD_DIM",
        "new_values": "MAX_TOKENS, KV_HEADS, HEAD_DIM",
        "unit_out": new_out,
        "packed": packed,
        "column_token": "SCORE_ROWS, COLUMNS",
        "key_scale_rows": "QUERY_ROWS, LANES",
        "value_scale_rows": "QUERY_ROWS, LANES",
        "kv_swapped": "TILES_PER_WAVE, KV_HEADS, PAIR_WORDS, HEAD_LANES",
        "scores": f"TILES_PER_WAVE, SCORE_ROWS, {_columns(recipe)}",
        **query_row_shapes("QUERY_ROWS"),
        "tile_max": "TILES_PER_WAVE, QUERY_ROWS, LANES",
        "row_max": "QUERY_ROWS, LANES",
        "row_sum": "QUERY_ROWS, LANES",
        "acc": f"QUERY_ROWS, {_value_lanes(recipe)}",
        "out_all": f"{rows}, Q_HEADS, HEAD_DIM",
        "lse_rows": f"{rows}, PADDED_Q_HEADS, LANES",
        **WAVE_SHAPES,
        "kv_sem": "WAVE_BUFFERS + FIRST_STEPS" if tiles.first_steps(recipe) else "WAVE_BUFFERS",
        "unit_sem": "1" if tiles.writes_apart(spec) else "WRITE_BUFFERS",
        "lse_sem": "1",
    }


def window_begin(spec: Spec, tiles: DecodeWaves) -> str:
    """Where a window begins that has an entry of the page tables: at its row, or where the last whole window does."""
    row = "entry - remainder(entry, LANES)"
    windows = WaveWindows.of(spec, tiles.tile, tiles.tiles_per_wave, tiles.lookahead)
    return row if windows.entries == LANES else f"jnp.minimum({row}, TABLE_ENTRIES - WINDOW_ENTRIES)"


def _tiles_fit(spec: Spec, tiles: DecodeWaves) -> bool:
    """Whether no tile reaches past the end of a sequence's page table: a window begins at any page, and so do its tiles."""
    model = spec.model
    whole = math.gcd(model.attention_chunk or 0, spec.serving.max_model_len) % tiles.tile == 0
    return model.sliding_window is None and whole
