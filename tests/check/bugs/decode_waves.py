"""Bugs of decode kernels by waves of tiles."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mutation import Bug, BugSuite
from small import SEPARATE, small_plan

FETCHES = (
    Bug(
        "the next page fetched in place of each",
        "DecodeKernel.page_id",
        "self.page_indices[entry + page]",
        "self.page_indices[entry + page + 1]",
    ),
    Bug(
        "a last page of one token not fetched",
        "DecodeKernel.fetch_pages",
        "page * PAGE_SIZE < fetched",
        "page * PAGE_SIZE < fetched - 1",
        hangs=True,
    ),
    Bug(
        "a page behind the last token fetched",
        "DecodeKernel.fetch_pages",
        "page * PAGE_SIZE < fetched",
        "page * PAGE_SIZE <= fetched",
    ),
    Bug(
        "a wave fetched over the one before it",
        "DecodeKernel.compute_tiles",
        "self.fetch_tile(wave + LOOKAHEAD, i, *ahead)",
        "self.fetch_tile(wave + LOOKAHEAD + 1, i, *ahead)",
        hangs=True,
    ),
    Bug(
        "a wave fetched over the next one",
        "DecodeKernel.compute_tiles",
        "self.fetch_tile(wave + LOOKAHEAD, i, *ahead)",
        "self.fetch_tile(wave + 1, i, *ahead)",
        hangs=True,
    ),
    Bug(
        "a wave too few fetched at first",
        "DecodeKernel.attend",
        "lax.fori_loop(1, LOOKAHEAD + 1, self.fetch_first_wave, ahead)",
        "lax.fori_loop(1, LOOKAHEAD, self.fetch_first_wave, ahead)",
        hangs=True,
    ),
    Bug("an empty tile after a full last one", "DecodeKernel.next_tile", "left <= TILE", "left < TILE"),
    Bug(
        "a last tile of one token left out",
        "DecodeKernel.next_tile",
        "left <= TILE",
        "left <= TILE + 1",
        hangs=True,
    ),
    Bug(
        "the last wave left out",
        "DecodeKernel.iterate",
        "self.tile_seq[self.slot(wave + 1, 0)]",
        "self.tile_seq[self.slot(wave + 2, 0)]",
    ),
)
WAITS = (
    Bug(
        "no wait for pages",
        "DecodeKernel.wait_for_tiles",
        "pl.when(pages > 0)(functools.partial(wait_for_bytes, self.cache_hbm.at[pl.ds(0, pages)], self.kv_sem.at[sem]))",
    ),
    Bug(
        "pages behind a tile waited for",
        "DecodeKernel.pages_of_tile",
        "jnp.clip(self.tile_left[slot], 0, TILE)",
        "jnp.maximum(self.tile_left[slot], 0)",
        hangs=True,
    ),
    Bug("no wait for a partial page", "DecodeKernel.pages_of_tile", "tokens + (PAGE_SIZE - 1)", "tokens"),
    Bug(
        "no wave waited for or patched",
        "DecodeKernel.iterate",
        "self.wait_and_patch(self.slot(wave + 1, 0), TILES_PER_WAVE, lax.rem(wave + 1, WAVE_BUFFERS))",
        hangs=True,
    ),
    Bug(
        "the last tile of a wave not waited for",
        "DecodeKernel.iterate",
        "self.wait_and_patch(self.slot(wave + 1, 0), TILES_PER_WAVE, lax.rem(wave + 1, WAVE_BUFFERS))",
        "self.wait_and_patch(self.slot(wave + 1, 0), TILES_PER_WAVE - 1, lax.rem(wave + 1, WAVE_BUFFERS))",
        hangs=True,
    ),
    Bug(
        "the next wave's semaphore waited on",
        "DecodeKernel.iterate",
        "lax.rem(wave + 1, WAVE_BUFFERS)",
        "lax.rem(wave + 2, WAVE_BUFFERS)",
        hangs=True,
    ),
    Bug(
        "no wait for the first tiles",
        "DecodeKernel.score_first_tiles",
        "self.wait_and_patch(self.slot(1, first), FIRST_TILES, WAVE_BUFFERS + step)",
        hangs=True,
    ),
    Bug(
        "the pages of all first tiles waited for by one step",
        "DecodeKernel.fetch_sem",
        "WAVE_BUFFERS + i // FIRST_TILES",
        "WAVE_BUFFERS",
        hangs=True,
    ),
    Bug("no wait for queries, keys and values", "DecodeKernel.attend", "load.wait()"),
    Bug(
        "no wait for a cache write before its buffer is used again",
        "DecodeKernel.update_cache",
        "pl.when(is_wanted & (seq >= WRITE_BUFFERS))(functools.partial(self.wait_for_writes, seq - WRITE_BUFFERS))",
    ),
    Bug("no wait for the last cache writes", "DecodeKernel.drain_write", "self.wait_for_writes(self.num_seqs - 1 - i)"),
    Bug("no wait for the outputs", "DecodeKernel.write_results", "result.wait()"),
)
ENDS = (
    Bug(
        "a sequence that ends with a wave's last tile not patched",
        "DecodeKernel.first_open",
        "seq + 1",
        "seq",
        hangs=True,
    ),
    Bug(
        "a sequence that ends with a full tile not patched",
        "DecodeKernel.first_open",
        "self.tile_left[slot] > TILE",
        "self.tile_left[slot] >= TILE",
        hangs=True,
    ),
    Bug(
        "the tile of another sequence patched",
        "DecodeKernel.patch_last_tiles",
        "self.last_slot[seq]",
        "self.last_slot[jnp.maximum(seq - 1, 0)]",
    ),
    Bug(
        "what lies behind the last token not cleared",
        "DecodeKernel.patch_last_tiles.clear_tails",
        "self.clear_tail(slot, left)",
    ),
    Bug(
        "one of two sequences that end together not patched",
        "DecodeKernel.patch_last_tiles",
        "first + 2 * pair + 1",
        "first + 2 * pair",
    ),
    Bug(
        "no token cleared where one of two sequences ends with a full tile",
        "DecodeKernel.patch_last_tiles",
        "jnp.minimum(*lefts) < TILE",
        "jnp.maximum(*lefts) < TILE",
    ),
    Bug(
        "a new token on its way to the cache twice",
        "DecodeKernel.update_cache",
        "seq != seqs[-1]",
        "seq >= 0",
        hangs=True,
    ),
    Bug(
        "the last token of V cleared",
        "PagedKernel.clear_elements",
        "first + token < valid",
        "first + token < valid - 1",
    ),
    Bug(
        "a token of V behind the last one not cleared",
        "PagedKernel.clear_elements",
        "first + token < valid",
        "first + token <= valid",
    ),
    Bug(
        "sublane tiles behind the last token not cleared where one is cleared at a time",
        "PagedKernel.clear_tail",
        "for_each(first, wide * several, functools.partial(self.clear_tiles, buffer, 1))",
    ),
    Bug(
        "sublane tiles behind the last token not cleared where several are cleared at a time",
        "PagedKernel.clear_tail",
        "for_each(wide, quotient(end, several), functools.partial(self.clear_tiles, buffer, several))",
    ),
    Bug(
        "V cleared to the end of its page only", "DecodeKernel", "computed_tokens = TILE", "computed_tokens = PAGE_SIZE"
    ),
)
SOFTMAX = (
    Bug("a token too many seen", "DecodeKernel.visible_tokens", "token < left", "token < left + 1"),
    Bug("the last token not seen", "DecodeKernel.visible_tokens", "token < left", "token < left - 1"),
    Bug(
        "a tile masked by the lengths of the next wave",
        "DecodeKernel.visible_tokens",
        "self.slot(wave, i)",
        "self.slot(wave + 1, i)",
    ),
    Bug(
        "the sum of the sequence before added",
        "DecodeKernel.merge",
        "jnp.where(begins, 0.0, old_sum)",
        "old_sum",
    ),
    Bug(
        "the output of the sequence before added",
        "DecodeKernel.merge",
        "jnp.where(begins, 0.0, old_acc)",
        "old_acc",
    ),
    Bug(
        "the maximum of the sequence before kept",
        "DecodeKernel.merge",
        "old_max = jnp.where(begins, MASKED, old_max)",
    ),
    Bug(
        "no tile begins a sequence",
        "DecodeKernel.merge",
        "self.tile_first[self.slot(wave, i)] == 0",
        "self.tile_first[self.slot(wave, i)] < 0",
    ),
    Bug(
        "every tile begins a sequence",
        "DecodeKernel.merge",
        "self.tile_first[self.slot(wave, i)] == 0",
        "self.tile_first[self.slot(wave, i)] >= 0",
    ),
    Bug(
        "the sum not rescaled",
        "DecodeKernel.merge",
        "jnp.where(begins, 0.0, old_sum) * alpha",
        "jnp.where(begins, 0.0, old_sum)",
    ),
    Bug("the sum of a tile not rescaled", "DecodeKernel.merge", "tile_sum * beta", "tile_sum"),
    Bug(
        "the output not rescaled",
        "DecodeKernel.merge",
        "jnp.where(begins, 0.0, old_acc) * broadcast_lanes(alpha, HEAD_LANES)",
        "jnp.where(begins, 0.0, old_acc)",
    ),
    Bug(
        "the output of a tile not rescaled",
        "DecodeKernel.merge",
        "values * broadcast_lanes(beta, HEAD_LANES)",
        "values",
    ),
    Bug(
        "a tile merged as one of the next wave",
        "DecodeKernel.compute_tiles",
        "self.merge(wave, i, state, tile_max, tile_sum, self.accumulate_pv(wave, i, p))",
        "self.merge(wave + 1, i, state, tile_max, tile_sum, self.accumulate_pv(wave, i, p))",
    ),
    Bug(
        "the running softmax not kept for the next iteration",
        "DecodeKernel.compute_wave",
        "self.row_max[...], self.row_sum[...], self.acc[...] = state",
    ),
)
HEADS = (
    Bug(
        "scores kept in a tile that is fetched",
        "DecodeKernel.wait_for_scores",
        "self.kv.at[self.slot(wave, i), 0, K_PLANE, 0]",
        "self.kv.at[self.slot(wave + 2, i), 0, K_PLANE, 0]",
    ),
    Bug(
        "values of the next wave",
        "DecodeKernel.compute_tiles",
        "self.accumulate_pv(wave, i, p)",
        "self.accumulate_pv(wave + 1, i, p)",
    ),
    Bug(
        "scores of this wave in place of the next",
        "DecodeKernel.compute_tiles",
        "self.keep_scores(wave + 1, i)",
        "self.keep_scores(wave, i)",
    ),
    Bug("K read for V", "DecodeKernel.head_values", "V_PLANE", "K_PLANE"),
    Bug(
        "the first row of each head taken from the head before",
        "select_own_rows",
        "row >= i * HEAD_QUERY_ROWS",
        "row > i * HEAD_QUERY_ROWS",
    ),
    Bug(
        "the last row of each head taken from the next head",
        "select_own_rows",
        "row >= i * HEAD_QUERY_ROWS",
        "row >= i * HEAD_QUERY_ROWS - 1",
    ),
    Bug(
        "outputs of a wave's first tile only",
        "DecodeKernel.store_output",
        "self.out_all[self.tile_seq[self.slot(wave, i)]] = out.astype(self.out_all.dtype)",
        "if i == 0: self.out_all[self.tile_seq[self.slot(wave, i)]] = out.astype(self.out_all.dtype)",
    ),
)
UPDATES = (
    Bug(
        "the new token a row too far",
        "DecodeKernel.put_new_token",
        "remainder(token, SUBLANE_TILE)",
        "remainder(token + 1, SUBLANE_TILE)",
    ),
    Bug(
        "the new token written to the next page",
        "DecodeKernel.start_write",
        "quotient(self.kv_lens[seq] - 1, PAGE_SIZE)",
        "quotient(self.kv_lens[seq], PAGE_SIZE)",
    ),
    Bug(
        "the new token written to the sublane tile before",
        "DecodeKernel.cache_write",
        "self.kv_lens[seq] - 1",
        "jnp.maximum(self.kv_lens[seq] - 1 - SUBLANE_TILE, 0)",
    ),
    Bug("the new token behind its place", "DecodeKernel.put_new_token", "left - 1", "left"),
    Bug(
        "the new value for K too",
        "DecodeKernel.new_kv_rows",
        "(self.new_keys, self.new_values)",
        "(self.new_values, self.new_values)",
    ),
    Bug(
        "the new token of the first sequence for all",
        "DecodeKernel.put_new_token",
        "self.packed[seq, i]",
        "self.packed[0, i]",
    ),
    Bug("the first head's new token for all", "DecodeKernel.patched", "new[head : head + 1]", "new[0:1]"),
    Bug(
        "the new token neither attended to nor written",
        "DecodeKernel.patch_last_tiles",
        "self.update_cache(seqs, slots, lefts)",
        hangs=True,
    ),
    Bug(
        "the new token not attended to",
        "DecodeKernel.put_new_token",
        "self.kv[slot, page, plane, head, tokens] = rows",
    ),
    Bug(
        "something else written in place of the new token",
        "DecodeKernel.put_new_token",
        "self.new_out[buffer, plane, head] = rows",
    ),
    Bug(
        "the new token not written",
        "DecodeKernel.start_write",
        "self.cache_write(seq, self.page_indices[entry]).start()",
        hangs=True,
    ),
)

# A page table that ends within a tile.
PAST_THE_END = (
    Bug(
        "the page table read past its end",
        "DecodeKernel.page_id",
        "jnp.minimum(entry + page, LAST_ENTRY)",
        "entry + page",
        says="Out-of-bounds read",
    ),
)

plan = partial(small_plan, kind="decode")
SUITES = [
    BugSuite(
        "decode, waves",
        SEPARATE,
        plan,
        FETCHES + WAITS + ENDS + SOFTMAX + HEADS + UPDATES,
        ordinary=(
            "the last tile of a wave not waited for",
            "scores kept in a tile that is fetched",
            "sublane tiles behind the last token not cleared where several are cleared at a time",
            "the output of a tile not rescaled",
            "the new token a row too far",
        ),
    ),
    BugSuite(
        "decode, waves, a page table that ends within a tile",
        replace(SEPARATE, serving=replace(SEPARATE.serving, max_model_len=9 * SEPARATE.serving.page_size)),
        plan,
        PAST_THE_END,
    ),
]
