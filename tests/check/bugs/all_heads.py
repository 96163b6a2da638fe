"""Bugs of decode kernels that take interleaved K and V of all heads as they lie."""

from __future__ import annotations

from functools import partial

from mutation import Bug, BugSuite
from small import ALL_FEATURES, INTERLEAVED, featured, small_plan

HEADS = (
    Bug("which token a score is of not said", "DecodeKernel.attend", "self.load_column_tokens()"),
    Bug(
        "the heads of other queries seen",
        "DecodeKernel.is_own",
        "head == lax.div(row, HEAD_QUERY_ROWS)",
        "head >= 0",
    ),
    Bug(
        "the last query of each head given to the next",
        "DecodeKernel.is_own",
        "lax.div(row, HEAD_QUERY_ROWS)",
        "lax.div(row + 1, HEAD_QUERY_ROWS)",
    ),
    Bug(
        "each row of K taken for the one of the head before",
        "DecodeKernel.load_column_tokens",
        "lax.rem(column, TOKEN_COLUMNS)",
        "lax.rem(column + 1, TOKEN_COLUMNS)",
    ),
    Bug("K read for V", "DecodeKernel.accumulate_pv", "self.tile_values(wave, i)", "self.tile_keys(wave, i)"),
    Bug(
        "K of this wave in place of the next",
        "DecodeKernel.compute_tiles",
        "self.keep_scores(wave + 1, i)",
        "self.keep_scores(wave, i)",
    ),
    Bug(
        "scores masked by the lengths of the wave before",
        "DecodeKernel.keep_scores",
        "self.visible_tokens(wave, i)",
        "self.visible_tokens(wave - 1, i)",
    ),
)
SOFTMAX = (
    Bug(
        "the largest score not kept",
        "DecodeKernel.keep_scores",
        "self.tile_max[i] = largest if is_last_of_wave(i) else max_lanes(largest)",
    ),
    Bug(
        "a part of the largest score of a wave's last tile taken for the whole",
        "DecodeKernel.largest_of_tile",
        "max_lanes(self.tile_max[i])",
        "self.tile_max[i]",
    ),
    Bug(
        "probabilities of a wave's first tile for all",
        "DecodeKernel.compute_tiles",
        "softmax = self.softmax(wave, i + 1, paced_by(self.largest_of_tile(i + 1), made))",
    ),
    Bug(
        "scores kept in a tile that is fetched",
        "DecodeKernel.wait_for_scores",
        "self.slot(wave, i)",
        "self.slot(wave + 2, i)",
    ),
    Bug("what is waited for taken for a maximum", "paced_by", "waits < -jnp.inf", "waits > -jnp.inf"),
    Bug("a token too many seen", "DecodeKernel.visible_tokens", "token < left", "token < left + 1"),
    Bug("the last token not seen", "DecodeKernel.visible_tokens", "token < left", "token < left - 1"),
    Bug(
        "what lies behind the last token not cleared",
        "DecodeKernel.patch_last_tiles.clear_tails",
        "self.clear_tail(slot, left)",
    ),
)
OWN_ROWS = (
    Bug(
        "rows of the set before for each lane", "DecodeKernel.score_rows", "set_of_lane >= index", "set_of_lane > index"
    ),
    Bug(
        "probabilities for the queries of all sets", "DecodeKernel.spread_rows", "set_of_lane == i", "set_of_lane >= 0"
    ),
    Bug(
        "the other heads of a set seen",
        "DecodeKernel.is_own",
        "lax.rem(head, HEADS_PER_SET) == lax.div(row, HEAD_QUERY_ROWS)",
        "head >= 0",
    ),
    Bug(
        "each lane taken for one of the next set",
        "DecodeKernel.set_of_lane",
        "lax.div(lax.div(column, HEAD_COLUMNS), HEADS_PER_SET)",
        "lax.div(lax.div(column, HEAD_COLUMNS) + 1, HEADS_PER_SET)",
    ),
)
HALVES = (
    Bug("scores with the wrong half of the next head", "DecodeKernel.whole_scores", "lane & 1 == 0", "lane & 1 == 1"),
    Bug("scores with one half of K", "DecodeKernel.whole_scores", "part + other", "part"),
    Bug(
        "halves of outputs in the place of the other set's",
        "join_halves",
        "range(0, ROW_SETS, 2)",
        "reversed(range(0, ROW_SETS, 2))",
    ),
)
UPDATES = (
    Bug(
        "the new token of the first sequence for all",
        "DecodeKernel.new_words",
        "self.packed[seq]",
        "self.packed[0]",
    ),
    Bug(
        "the new tokens of some sequences not packed",
        "DecodeKernel.attend",
        "pl.cdiv(self.num_seqs, PACKED_AT_ONCE)",
        "pl.cdiv(self.num_seqs, PACKED_AT_ONCE) - 1",
    ),
    Bug("the new token behind its place", "DecodeKernel.put_new_token", "left - 1", "left"),
    Bug(
        "the new token written to the next page",
        "DecodeKernel.start_write",
        "quotient(self.kv_lens[seq] - 1, PAGE_SIZE)",
        "quotient(self.kv_lens[seq], PAGE_SIZE)",
    ),
    Bug(
        "the new token written where the one before it is",
        "DecodeKernel.cache_write",
        "self.kv_lens[seq] - 1",
        "jnp.maximum(self.kv_lens[seq] - 2, 0)",
    ),
    Bug(
        "the new token not attended to",
        "DecodeKernel.put_new_token",
        "self.kv[buffer, rows] = words_as_rows(words)",
    ),
    Bug(
        "no wait for a cache write before its buffer is used again",
        "DecodeKernel.update_cache",
        "pl.when(is_wanted & (seq >= WRITE_BUFFERS))(functools.partial(self.wait_for_writes, seq - WRITE_BUFFERS))",
    ),
)
FEATURES = (
    Bug("a window one too long", "DecodeKernel.visible_tokens", "token >= left - WINDOW", "token >= left - WINDOW - 1"),
    Bug("a window one too short", "DecodeKernel.visible_tokens", "token >= left - WINDOW", "token > left - WINDOW"),
    Bug(
        "scores not capped",
        "DecodeKernel.keep_scores",
        "cap_scores(scores * SCORE_SCALE)",
        "SOFT_CAP * SCORE_SCALE * scores",
    ),
)

plan = partial(small_plan, kind="decode")
SUITES = [
    BugSuite(
        "decode, all heads",
        INTERLEAVED,
        plan,
        HEADS + SOFTMAX + UPDATES,
        ordinary=(
            "the last query of each head given to the next",
            "each row of K taken for the one of the head before",
            "scores masked by the lengths of the wave before",
            "what lies behind the last token not cleared",
        ),
    ),
    BugSuite(
        "decode, all heads, rows of the own set",
        featured(INTERLEAVED, {"q_heads": 16, "kv_heads": 4}),
        plan,
        OWN_ROWS,
        ordinary=("the other heads of a set seen",),
    ),
    BugSuite(
        "decode, all heads, rows of two registers",
        featured(INTERLEAVED, {"q_heads": 16, "kv_heads": 2, "head_dim": 256}),
        plan,
        HALVES,
    ),
    BugSuite("decode, all heads, features", featured(INTERLEAVED, ALL_FEATURES), plan, FEATURES),
]
