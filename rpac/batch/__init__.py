"""The batch contract: the metadata arrays of a call, built from plain lists and validated.

Each sequence is a row. Rows 0 to i - 1 are decode rows (exactly `decode_len` new tokens, 1 by default), rows i to j - 1 are
prefill rows (exactly `prefill_chunk` new tokens), and rows j to k - 1 are mixed rows (any number of new tokens, at least
one), where (i, j, k) is the distribution. The new tokens of row r are queries[cu_q_lens[r]:cu_q_lens[r + 1]], at positions
kv_lens[r] - q_len to kv_lens[r] - 1 of their sequence.

Only the first ceil(kv_lens[r] / page_size) entries of the page table of row r are read. With a window or a chunk of attention
only those are read that hold a token that the row's first new token sees, or a later one. The other entries may hold
anything, such as -1 or a page that was freed. Rows from k on are dead: they, and cu_q_lens past index k, may hold anything.
docs/batch-contract.md has every array.
"""

from rpac.batch.build import Batch, SequenceView
from rpac.batch.limits import Limits
from rpac.batch.validate import validate
from rpac.contract.kind import Kind, select_kind

__all__ = ["Batch", "Kind", "Limits", "SequenceView", "select_kind", "validate"]
