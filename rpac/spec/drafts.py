"""The rules of `serving.decode_len` and `serving.tree_mask`: decode rows that verify drafts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rpac.contract.attention import Attention, Serving
from rpac.spec.nodes import Section


def check_drafts(section: Section, features: Mapping[str, Any]) -> None:
    """Refuses a tree of drafts where there are no drafts."""
    if features["tree_mask"] and features["decode_len"] == 1:
        allowed = "must be left out with decode_len 1: a row's only new token sees itself"
        section.clash("tree_mask", allowed, "remove it, or write `decode_len: 4`")


def check_rows(section: Section, max_num_tokens: int, max_num_seqs: int, decode_len: int) -> None:
    """Refuses more sequences than can decode at once."""
    if max_num_seqs * decode_len <= max_num_tokens:
        return
    most = max(max_num_tokens // decode_len, 1)
    allowed = f"must be at most max_num_tokens ({max_num_tokens}): decode takes a token of every sequence"
    if decode_len > 1:
        allowed = (
            f"must be at most {most}, max_num_tokens ({max_num_tokens}) by decode_len ({decode_len}): decode takes as many "
            "tokens of every sequence"
        )
    section.clash("max_num_seqs", allowed, f"write {most} or raise max_num_tokens")


def check_room(section: Section, decode_len: int, buckets: tuple[int, ...] | None, max_model_len: int | None) -> None:
    """Refuses decode rows that are longer than a sequence, or than a token bucket."""
    if max_model_len is not None and decode_len > max_model_len:
        allowed = f"must be at most max_model_len ({max_model_len})"
        section.clash("decode_len", allowed, f"write {max_model_len} or less, or raise max_model_len")
    if buckets is not None and buckets[0] < decode_len:
        allowed = f"must be at least decode_len ({decode_len}) each: a decode row has as many tokens"
        kept = [bucket for bucket in buckets if bucket >= decode_len]
        section.clash("token_buckets", allowed, f"write {kept or [decode_len]}", f"{buckets[0]} at its start")


def check_kinds(section: Section, serving: Serving, models: Iterable[Attention]) -> None:
    """Refuses drafts beside kinds of attention that have no code for them. `section` is that of `serving`."""
    models = tuple(models)
    if serving.decode_len > 1 and any(model.rope_dim is not None for model in models):
        allowed = "must be 1 with attention latent: its kernels take one new token for each decode row"
        section.clash("decode_len", allowed, "remove one of the two")
    if serving.decode_len > 1 and not all(model.causal for model in models):
        allowed = "must be 1 with causal false: a draft is verified from the tokens before it alone"
        section.clash("decode_len", allowed, "remove one of the two")
    if serving.decode_len > 1 and any(model.alibi for model in models):
        allowed = "must be 1 with alibi: a bias is counted from the last token of a decode row"
        section.clash("decode_len", allowed, "remove one of the two")
    if serving.tree_mask and any(model.sliding_window is not None for model in models):
        allowed = (
            "must be left out with sliding_window: a window counts from a draft's depth, which the mask does not hold"
        )
        section.clash("tree_mask", allowed, "remove one of the two")
    if serving.tree_mask and any(model.attention_chunk is not None for model in models):
        allowed = "must be left out with attention_chunk: a chunk ends at a draft's depth, which the mask does not hold"
        section.clash("tree_mask", allowed, "remove one of the two")
