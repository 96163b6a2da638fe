"""Bugs of how prefill and mixed kernels update the cache, a page at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mutation import Bug, BugSuite, in_mixed
from small import INTERLEAVED, ITERATED, SEPARATE, iterated_plan, small_plan

BOTH = (
    Bug("no wait for new keys and values", "PrefillKernel.merge_page", "copy.wait()"),
    Bug(
        "no wait for a page that holds old tokens",
        "PrefillKernel.merge_page.wait_for_old_tokens",
        "self.old_page_copy(seq, page, buffer).wait()",
    ),
    Bug(
        "no wait for a cache write before its buffer is used again",
        "PrefillKernel.start_page_copies.wait_for_buffer",
        "self.page_write(seq, page, buffer).wait()",
    ),
    Bug(
        "no wait for the last cache writes",
        "PrefillKernel.wait_last_write",
        "pl.when(self.updated[buffer] > 0)(write.wait)",
    ),
    Bug(
        "the next page written in place of each",
        "PrefillKernel.page_write",
        "seq * PAGES_PER_SEQ + page",
        "seq * PAGES_PER_SEQ + page + 1",
    ),
    Bug(
        "no page updated",
        "PrefillKernel.attend",
        "self.update_pages(functools.partial(self.start_fetch, 0, start, early))",
        "functools.partial(self.start_fetch, 0, start, early)()",
    ),
)
# Interleaved K and V.
WORDS = (
    Bug("old tokens of a page lost", "PrefillKernel.merge_tokens", "(token >= first) & (token < end)", "token < end"),
    Bug(
        "tokens after the last new one written",
        "PrefillKernel.merge_tokens",
        "(token >= first) & (token < end)",
        "token >= first",
    ),
)
# Separate K and V.
HEADS = (
    Bug("old tokens of a page lost", "PrefillKernel.merge_tokens", "(low >= first) & (low < end)", "low < end"),
    Bug(
        "tokens after the last new one written",
        "PrefillKernel.merge_tokens",
        "(low >= first) & (low < end)",
        "low >= first",
    ),
    Bug(
        "the new token before put in place of each",
        "PrefillKernel.new_rows",
        "PAGE_SIZE + start",
        "PAGE_SIZE + start - 1",
    ),
    Bug(
        "new values put in place of new keys",
        "PrefillKernel.merge_tokens",
        "self.new_rows(self.new_keys, new_buffer, start)",
        "self.new_rows(self.new_values, new_buffer, start)",
    ),
    Bug("new tokens of the first head for all", "PrefillKernel.merge_tokens", "by_head[head]", "by_head[0]"),
    Bug(
        "new tokens taken from the next buffer",
        "PrefillKernel.merge_page",
        "lax.rem(step, NEW_BUFFERS)",
        "lax.rem(step + 1, NEW_BUFFERS)",
        hangs=True,
    ),
    Bug(
        "only the first head updated",
        "PrefillKernel.merge_tokens",
        "self.page_rows[buffer, plane, head, tokens] = pltpu.bitcast(words, self.page_rows.dtype)",
        "self.page_rows[buffer, plane, 0, tokens] = pltpu.bitcast(words, self.page_rows.dtype)",
    ),
)
# More pages to update than the kernel has buffers for.
BUFFERS = (
    Bug(
        "no wait for a cache write before its buffer is used again",
        "PrefillKernel.start_page_copies.wait_for_buffer",
        "self.page_write(seq, page, buffer).wait()",
    ),
    Bug(
        "a buffer used again a page too early",
        "PrefillKernel.start_page_copies.wait_for_buffer",
        "step >= PAGE_BUFFERS",
        "step > PAGE_BUFFERS",
    ),
    Bug(
        "each page loaded into the next buffer",
        "PrefillKernel.update_page",
        "step + UPDATE_LOOKAHEAD",
        "step + UPDATE_LOOKAHEAD + 1",
        hangs=True,
    ),
    Bug(
        "a page too few loaded at first",
        "PrefillKernel.update_pages",
        "range(UPDATE_LOOKAHEAD)",
        "range(UPDATE_LOOKAHEAD - 1)",
        hangs=True,
    ),
    Bug(
        "no wait for the oldest of the last cache writes",
        "PrefillKernel.update_pages",
        "jnp.minimum(steps, PAGE_BUFFERS)",
        "jnp.minimum(steps, PAGE_BUFFERS - 1)",
    ),
)

SMALL_PAGES = replace(ITERATED["separate"], serving=replace(ITERATED["separate"].serving, page_size=16))
prefill, mixed = partial(small_plan, kind="prefill"), partial(small_plan, kind="mixed")
SUITES = [
    BugSuite(
        "cache update, prefill, interleaved",
        INTERLEAVED,
        prefill,
        BOTH + WORDS,
        ordinary=(
            "no wait for a page that holds old tokens",
            "no wait for the last cache writes",
        ),
    ),
    BugSuite(
        "cache update, prefill, separate",
        SEPARATE,
        prefill,
        BOTH + HEADS,
        ordinary=("new values put in place of new keys",),
    ),
    BugSuite("cache update, mixed", INTERLEAVED, mixed, tuple(map(in_mixed, BOTH + WORDS))),
    BugSuite("cache update, small pages", SMALL_PAGES, partial(iterated_plan, kind="prefill"), BUFFERS),
]
