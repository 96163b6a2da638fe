"""Sizes that follow from others: powers of two, parts of a whole, what the fetches of a decode kernel need."""

from __future__ import annotations

from typing import Final

from rpac.spec import Spec

MIB: Final = 1 << 20
IN_FLIGHT_BYTES: Final = 8 * MIB  # more than the HBM delivers within one DMA's latency (5.4 MB on TPU7x)


def copy_sizes_of(kind: str, q_block: int, tokens: int) -> tuple[int, ...]:
    """The sizes of copies, in tokens, that together make any part of a query block that a bucket can hold."""
    if kind == "prefill":
        return (q_block,)
    return tuple(1 << bit for bit in reversed(range(power_of_two_to(min(q_block, tokens)).bit_length())))


def largest_divisor(value: int, most: int) -> int:
    """The largest divisor of `value` that is at most `most` (at least 1)."""
    return next(divisor for divisor in range(min(value, most), 0, -1) if value % divisor == 0)


def power_of_two_to(value: int) -> int:
    """The largest power of two that is not above `value` (at least 1)."""
    return 1 << (max(value, 1).bit_length() - 1)


def power_of_two_from(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()


def most_visible_tokens(spec: Spec, queries: int) -> int:
    """How many tokens `queries` queries in a row can see, and those before them in the page of the first."""
    most = spec.serving.max_model_len
    if spec.model.attention_chunk is not None:
        most = min(most, spec.model.attention_chunk + queries - 1)
    if spec.model.sliding_window is not None:
        most = min(most, spec.model.sliding_window + queries - 1)
    return most + spec.serving.page_size - 1


def visible_tokens(spec: Spec, queries: int) -> tuple[int, ...]:
    """How many tokens `queries` queries in a row see at each of the expected lengths."""
    window = spec.model.sliding_window
    lengths = spec.serving.context_lens
    if spec.model.attention_chunk is not None:
        return tuple(min(length, spec.model.attention_chunk) for length in lengths)
    return lengths if window is None else tuple(min(length, window + queries - 1) for length in lengths)
