"""What a spec, a batch and a call are told whose decode rows have several new tokens, and cannot be."""

# A case a line, however long its message is.
# ruff: noqa: E501

from __future__ import annotations

import re

import numpy as np
import pytest
from test_latent_errors import GOOD as LATENT
from test_spec_errors import GOOD, report

from rpac.batch import Batch, Limits, validate
from rpac.errors import BatchError
from rpac.serving import Scheduler
from rpac.spec import parse_spec

LENGTH = "must be an integer from 1 to 8"
ADDED = {
    "none": ("decode_len: 0", f"9:15: serving.decode_len: found 0; {LENGTH}; write 1 or more"),
    "too many": ("decode_len: 9", f"9:15: serving.decode_len: found 9; {LENGTH}; write 8 or less"),
    "no number": ("decode_len: some", f"9:15: serving.decode_len: found some; {LENGTH}; write it in plain decimal digits"),
    "a tree of one": ("tree_mask: true", "9:14: serving.tree_mask: found true (a bool); must be left out with decode_len 1: a row's only new token sees itself; remove it, or write `decode_len: 4`"),
}  # fmt: skip
EDITED = {
    "too many in all": ("max_num_seqs: 4", "max_num_seqs: 9\n  decode_len: 4", "13:17: serving.max_num_seqs: found 9; must be at most 8, max_num_tokens (32) by decode_len (4): decode takes as many tokens of every sequence; write 8 or raise max_num_tokens"),
    "a bucket below a row": ("[8, 32]", "[4, 32]\n  decode_len: 5", "12:18: serving.token_buckets: found 4 at its start; must be at least decode_len (5) each: a decode row has as many tokens; write [32]"),
}  # fmt: skip


@pytest.mark.parametrize("line, said", ADDED.values(), ids=ADDED.keys())
def test_a_key_that_cannot_be_is_refused(line: str, said: str) -> None:
    assert report(GOOD.replace("serving:\n", f"serving:\n  {line}\n")) == [f"x.yaml:{said}"]


@pytest.mark.parametrize("old, new, said", EDITED.values(), ids=EDITED.keys())
def test_what_does_not_fit_is_refused(old: str, new: str, said: str) -> None:
    assert report(GOOD.replace(old, new)) == [f"x.yaml:{said}"]


WITHOUT = {
    "a tree in a window": ("decode_len: 4\n  tree_mask: true", "sliding_window: 9", "11:14: serving.tree_mask: found true (a bool); must be left out with sliding_window: a window counts from a draft's depth, which the mask does not hold; remove one of the two"),
    "drafts that see ahead": ("decode_len: 4", "causal: false", "10:15: serving.decode_len: found 4; must be 1 with causal false: a draft is verified from the tokens before it alone; remove one of the two"),
}  # fmt: skip


@pytest.mark.parametrize("drafts, feature, said", WITHOUT.values(), ids=WITHOUT.keys())
def test_what_drafts_do_not_go_with_is_refused_with_the_reason(drafts: str, feature: str, said: str) -> None:
    text = GOOD.replace("serving:\n", f"serving:\n  {drafts}\n")
    assert report(text.replace("  head_dim: 128\n", f"  head_dim: 128\n  {feature}\n")) == [f"x.yaml:{said}"]


@pytest.mark.parametrize("drafts, feature, said", WITHOUT.values(), ids=WITHOUT.keys())
def test_it_is_refused_once_where_several_layers_have_it(drafts: str, feature: str, said: str) -> None:
    text = GOOD.replace("serving:\n", f"serving:\n  {drafts}\n")
    (line,) = report(text + f"layers: {{a: {{{feature}}}, b: {{{feature}}}, c: {{}}}}\n")
    assert line.partition(": ")[2] == said.partition(": ")[2]


def test_latent_attention_has_no_drafts() -> None:
    said = "serving.decode_len: found 4; must be 1 with attention latent: its kernels take one new token for each decode row; remove one of the two"
    assert report(LATENT.replace("serving:\n", "serving:\n  decode_len: 4\n")) == [f"x.yaml:11:15: {said}"]


def test_written_defaults_mean_nothing() -> None:
    written = GOOD.replace("serving:\n", "serving:\n  decode_len: 1\n  tree_mask: false\n")
    assert parse_spec(written, "").hash == parse_spec(GOOD, "").hash
    used = parse_spec(GOOD.replace("serving:\n", "serving:\n  decode_len: 4\n  tree_mask: true\n"), "")
    assert used.meaning()["serving"] | {"decode_len": 4, "tree_mask": True} == used.meaning()["serving"]


LIMITS = Limits(
    page_size=4, pages_per_seq=5, max_num_seqs=6, num_pages=40, prefill_chunk=8, token_buckets=(32,), decode_len=4
)


def test_rows_of_as_many_new_tokens_are_decode_and_those_of_one_are_not() -> None:
    batch = Batch.build(LIMITS, [1, 4, 8, 4], [3, 0, 0, 7], [[0], [1], [2, 3], [4, 5, 6]])
    assert batch.distribution.tolist() == [2, 3, 4]
    assert batch.order == (1, 3, 2, 0)
    assert Limits.from_dict(LIMITS.as_dict()) == LIMITS


def test_a_decode_row_off_the_length_is_refused() -> None:
    batch = Batch.build(LIMITS, [4, 1], [0, 5], [[0], [1, 2]])
    distribution = np.array([2, 2, 2], np.int32)
    said = "row 1 (decode): has 1 new tokens; decode rows must have decode_len (4); move it after the decode rows"
    with pytest.raises(BatchError, match=re.escape(said)):
        validate(LIMITS, 32, batch.kv_lens, batch.page_indices, batch.cu_q_lens, distribution)


def test_a_scheduler_has_no_drafts() -> None:
    with pytest.raises(
        BatchError, match=re.escape("decode_len is 4; must be 1, the new tokens of a sequence that decodes here")
    ):
        Scheduler(LIMITS)
