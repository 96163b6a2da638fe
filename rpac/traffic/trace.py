"""Traffic: batches by their lengths, and traces of them, a JSON object a line."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

from rpac.batch import Batch, Limits
from rpac.contract.arrays import cdiv
from rpac.errors import BatchError


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
        # How many pages the cache has does not change how long a program takes.
        roomy = replace(limits, num_pages=max(limits.num_pages, sum(pages)))
        try:
            return Batch.build(roomy, list(self.q_lens), context, tables)
        except BatchError as error:
            raise BatchError(f"{self.label}: {error}") from error


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
