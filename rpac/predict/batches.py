"""Batches to predict, from the command line's notation or a spec's expected lengths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rpac.batch import Limits
from rpac.errors import BatchError
from rpac.traffic.trace import Workload, read_trace

_DECODE = re.compile(r"(\d+)x(\d+)", re.ASCII)
_PREFILL = re.compile(r"(\d+)x(\d+)/(\d+)", re.ASCII)
MAX_ROWS: Final = 1 << 16
"""Sequences of a batch in the command line's notation: a slip of the finger must not fill the memory."""


def parse_decode(text: str, decode_len: int = 1) -> Workload:
    """`64x1024`: 64 sequences with `decode_len` new tokens each, the last of 1024. Raises BatchError."""
    match = _DECODE.fullmatch(text)
    if match is None or not all(map(int, match.groups())):
        raise BatchError(f"--decode: found {text!r}; must be SEQUENCESxCONTEXT, such as 64x1024")
    rows, context = _rows("--decode", text, match[1]), int(match[2])
    if context < decode_len:
        raise BatchError(
            f"--decode: found {text!r}; must be of {decode_len} tokens at least, the new ones of a decode row"
        )
    return Workload(f"decode {text}", (decode_len,) * rows, (context,) * rows)


def parse_prefill(text: str) -> Workload:
    """`4x512/4096`: 4 sequences with 512 new tokens each, the last of 4096. Raises BatchError."""
    match = _PREFILL.fullmatch(text)
    if match is None or not all(map(int, match.groups())) or int(match[2]) > int(match[3]):
        raise BatchError(
            f"--prefill: found {text!r}; must be SEQUENCESxNEW/END with NEW at most END, such as 4x512/4096"
        )
    rows, new, end = _rows("--prefill", text, match[1]), int(match[2]), int(match[3])
    return Workload(f"prefill {text}", (new,) * rows, (end,) * rows)


def _rows(option: str, text: str, digits: str) -> int:
    if int(digits) > MAX_ROWS:
        raise BatchError(f"{option}: found {text!r}, {digits} sequences; must be at most {MAX_ROWS}")
    return int(digits)


@dataclass(frozen=True)
class Asked:
    """The batches that a command line names: `--decode` in its notation, because a bundle says how long its decode rows are."""

    decode: tuple[str, ...] = ()
    others: tuple[Workload, ...] = ()

    @classmethod
    def of(cls, decode: Iterable[str], prefill: Iterable[str], mixed: Path | None) -> Asked:
        """From the values of the options; `mixed` is a trace. Raises BatchError for the first that is none."""
        decode, others = tuple(decode), tuple(map(parse_prefill, prefill))
        for text in decode:
            parse_decode(text)
        return cls(decode, others if mixed is None else (*others, *read_trace(mixed)))

    def workloads(self, decode_len: int) -> list[Workload]:
        """For programs whose decode rows have `decode_len` new tokens, decode batches first."""
        return [*(parse_decode(text, decode_len) for text in self.decode), *self.others]


def expected(limits: Limits, context_lens: Iterable[int]) -> Iterator[Workload]:
    """What a spec expects: all sequences decoding at each of its lengths, and one chunk prefilled up to it."""
    lengths = tuple(context_lens)
    yield from expected_decode(limits, lengths)
    for length in lengths:
        if length >= limits.prefill_chunk:
            yield parse_prefill(f"1x{limits.prefill_chunk}/{length}")


def expected_decode(limits: Limits, context_lens: Iterable[int]) -> Iterator[Workload]:
    """All sequences decoding at each of some lengths."""
    for length in context_lens:
        yield parse_decode(f"{limits.max_num_seqs}x{max(length, limits.decode_len)}", limits.decode_len)
