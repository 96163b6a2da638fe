"""Batches to predict, from the command line's notation, a trace file, or a spec's expected lengths."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rpac.batch import Batch, Limits
from rpac.errors import BatchError
from rpac.layout import cdiv

_DECODE = re.compile(r"(\d+)x(\d+)", re.ASCII)
_PREFILL = re.compile(r"(\d+)x(\d+)/(\d+)", re.ASCII)
MAX_ROWS: Final = 1 << 16
"""Sequences of a batch in the command line's notation: a slip of the finger must not fill the memory."""


@dataclass(frozen=True)
class Workload:
    """A batch by its lengths, in tokens: new ones of each sequence, and those it has then (`kv_lens` include them)."""

    label: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]

    @property
    def uniform(self) -> bool:
        """Whether all sequences are alike."""
        return len(set(self.q_lens)) == len(set(self.kv_lens)) == 1

    @property
    def context(self) -> float:
        """The mean length of a sequence, in tokens."""
        return sum(self.kv_lens) / len(self.kv_lens)

    def batch(self, limits: Limits) -> Batch:
        """The metadata, on pages of its own for each sequence, in order; as many pages as it takes.

        Raises BatchError or SelectionError where the program's limits do not hold it.
        """
        # A batch that is far too large must not fill the memory with pages before it is refused.
        most = limits.pages_per_seq + 1 if len(self.kv_lens) <= limits.max_num_seqs else 0
        pages = [min(cdiv(kv, limits.page_size), most) for kv in self.kv_lens]
        ends = itertools.accumulate(pages)
        tables = [list(range(end - count, end)) for end, count in zip(ends, pages, strict=True)]
        context = [kv - q for q, kv in zip(self.q_lens, self.kv_lens, strict=True)]
        # How many pages the cache has does not change what a program does.
        roomy = replace(limits, num_pages=max(limits.num_pages, sum(pages)))
        try:
            return Batch.build(roomy, list(self.q_lens), context, tables)
        except BatchError as error:
            raise BatchError(f"{self.label}: {error}") from error


def parse_decode(text: str) -> Workload:
    """`64x1024`: 64 sequences with one new token each, the last of 1024. Raises BatchError."""
    match = _DECODE.fullmatch(text)
    if match is None or not all(map(int, match.groups())):
        raise BatchError(f"--decode: found {text!r}; must be SEQUENCESxCONTEXT, such as 64x1024")
    rows, context = _rows("--decode", text, match[1]), int(match[2])
    return Workload(f"decode {text}", (1,) * rows, (context,) * rows)


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


def read_trace(path: Path) -> list[Workload]:
    """The batches of a trace: JSON lines `{"q_lens": [...], "kv_lens": [...]}`; `kv_lens` include the new tokens.

    Blank lines are skipped. Raises BatchError, naming the line, or where the file holds no batch.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path}: cannot be read ({error}); give a file of JSON lines") from error
    found = [_trace_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BatchError(f'{path}: holds no batch; must have a line {{"q_lens": [...], "kv_lens": [...]}} for each')
    return found


def _trace_line(path: Path, number: int, line: str) -> Workload:
    wanted = f'{path}:{number}: must be {{"q_lens": [...], "kv_lens": [...]}} with as many integers in both'
    try:
        row = json.loads(line)
        q_lens, kv_lens = tuple(row["q_lens"]), tuple(row["kv_lens"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BatchError(f"{wanted}; found {line[:80]!r}") from error
    sound = all(type(n) is int and n > 0 for n in (*q_lens, *kv_lens)) and len(q_lens) == len(kv_lens) > 0
    if not sound or any(q > kv for q, kv in zip(q_lens, kv_lens, strict=True)):
        raise BatchError(f"{wanted}, each above 0 and q at most kv; found {line[:80]!r}")
    return Workload(f"{path.name}:{number}", q_lens, kv_lens)


def expected(limits: Limits, context_lens: tuple[int, ...]) -> Iterator[Workload]:
    """What a spec expects: all sequences decoding at each of its lengths, and one chunk prefilled up to it."""
    for length in context_lens:
        yield parse_decode(f"{limits.max_num_seqs}x{length}")
    for length in context_lens:
        if length >= limits.prefill_chunk:
            yield parse_prefill(f"1x{limits.prefill_chunk}/{length}")
