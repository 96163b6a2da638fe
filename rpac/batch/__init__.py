"""The batch contract: the metadata arrays of a call, built from plain lists and validated.

Sequences lie in rows: [0, i) decode (exactly `decode_len` new tokens, 1 unless the spec says more), [i, j) prefill
(exactly `prefill_chunk` new tokens) and [j, k) mixed (any number of new tokens, one at least), where (i, j, k) is the
distribution. The new tokens of row r are queries[cu_q_lens[r]:cu_q_lens[r + 1]], at positions kv_lens[r] - q_len to
kv_lens[r] - 1 of their sequence.
Only the first ceil(kv_lens[r] / page_size) entries of row r's page table are read; with a window or a chunk of attention
only those from the page of the first token on that the row's first new token sees. The other entries may hold anything, a
page that was freed or -1. Rows at or past k are dead: they, and cu_q_lens past index k, may hold anything.
"""

from rpac.batch.build import Batch, SequenceView
from rpac.batch.limits import Limits
from rpac.batch.validate import validate
from rpac.contract.kind import Kind, select_kind

__all__ = ["Batch", "Kind", "Limits", "SequenceView", "select_kind", "validate"]
