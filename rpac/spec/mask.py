"""The rules of what a query sees: `model.causal`, `sliding_window` and `attention_chunk`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rpac.contract.attention import Attention, Serving
from rpac.spec.nodes import Section

MIN_ATTENTION_CHUNK: Final = 16  # the shortest block of queries: one lies in two chunks at most


def check_mask(section: Section, features: Mapping[str, Any]) -> None:
    """Refuses windows, chunks and position biases that exclude each other, or look back where a query sees its whole sequence."""
    causal, window, chunk = (features[key] for key in ("causal", "sliding_window", "attention_chunk"))
    if not causal and window is not None:
        allowed = "must be true with sliding_window: a window looks back from a query, not ahead"
        section.clash("causal", allowed, "remove one of the two")
    if features["alibi"] and not causal:
        allowed = "must be false with causal false: a bias counts the tokens back from a query"
        section.clash("alibi", allowed, "remove one of the two")
    if chunk is not None and (not causal or window is not None):
        allowed = "must be left out with sliding_window, and with causal false: a query can have only one mask"
        section.clash("attention_chunk", allowed, "remove one of the two")


def check_mask_lengths(section: Section, model: Attention, serving: Serving) -> None:
    """Refuses windows and chunks that do not go with the lengths and pages that are served."""
    longest = serving.max_model_len
    if model.sliding_window is not None and model.sliding_window >= longest:
        allowed = f"must be below serving.max_model_len ({longest}): a window that long hides nothing"
        section.clash("sliding_window", allowed, "remove it", str(model.sliding_window))
    chunk, page = model.attention_chunk, serving.page_size
    if chunk is not None and chunk >= longest:
        allowed = f"must be below serving.max_model_len ({longest}): no sequence has a second chunk"
        section.clash("attention_chunk", allowed, "remove it, or raise max_model_len", str(chunk))
    elif chunk is not None and (chunk % page or chunk < MIN_ATTENTION_CHUNK):
        least = max(page, MIN_ATTENTION_CHUNK)
        allowed = f"must be a multiple of serving.page_size ({page}), {least} at least: a chunk begins with a page"
        section.clash("attention_chunk", allowed, f"write {max(chunk // page * page, least)}", str(chunk))
