"""The sizes that bound a batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rpac.contract.arrays import Served
from rpac.errors import SelectionError


@dataclass(frozen=True)
class Limits:
    """What a built program can take. Comes from a spec, or from the manifest of a bundle where no spec is at hand."""

    page_size: int
    pages_per_seq: int
    max_num_seqs: int
    num_pages: int
    prefill_chunk: int
    token_buckets: tuple[int, ...]
    decode_len: int = 1

    @classmethod
    def of(cls, spec: Served) -> Limits:
        """The limits of a spec."""
        serving = spec.serving
        return cls(
            page_size=serving.page_size,
            pages_per_seq=serving.pages_per_seq,
            max_num_seqs=serving.max_num_seqs,
            num_pages=serving.num_pages,
            prefill_chunk=serving.prefill_chunk,
            token_buckets=serving.token_buckets,
            decode_len=serving.decode_len,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Limits:
        """The inverse of `as_dict`. Raises ValueError, naming the entry, where `data` is anything else."""
        names = [field.name for field in fields(cls)]
        needed = [name for name in names if name != "decode_len"]
        if sorted(data) not in (sorted(needed), sorted(names)):
            raise ValueError(f"limits: found {sorted(data)}; must be {sorted(needed)}, and decode_len if above 1")
        for name in sorted(data.keys() - {"token_buckets"}):
            if type(data[name]) is not int or data[name] < 1:
                raise ValueError(f"limits.{name}: found {data[name]!r}; must be an integer above 0")
        buckets = data["token_buckets"]
        if not isinstance(buckets, (list, tuple)) or not buckets or any(type(b) is not int for b in buckets):
            raise ValueError(f"limits.token_buckets: found {buckets!r}; must be a list of integers")
        if buckets[0] < 1 or any(low >= high for low, high in itertools.pairwise(buckets)):
            raise ValueError(f"limits.token_buckets: found {buckets!r}; must ascend from 1 or more")
        return cls(**{**data, "token_buckets": tuple(buckets)})

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest; a `decode_len` of 1 is not in it, so that it is as it was before there were others."""
        data = {**asdict(self), "token_buckets": list(self.token_buckets)}
        return {name: value for name, value in data.items() if (name, value) != ("decode_len", 1)}

    @property
    def max_kv_len(self) -> int:
        """Tokens that a full page table holds."""
        return self.page_size * self.pages_per_seq

    def bucket(self, tokens: int) -> int:
        """The smallest bucket that holds `tokens`. Raises SelectionError where none does."""
        for bucket in self.token_buckets:
            if tokens <= bucket:
                return bucket
        raise SelectionError(
            f"the batch has {tokens} new tokens; the largest token bucket built is {self.token_buckets[-1]}; "
            f"split the batch, or build with\n{bucket_lines([*self.token_buckets, tokens])}"
        )


def bucket_lines(buckets: Sequence[int]) -> str:
    """The lines of a spec that make these buckets."""
    ascending = sorted(set(buckets))
    return f"serving:\n  max_num_tokens: {ascending[-1]}\n  token_buckets: {ascending}"
