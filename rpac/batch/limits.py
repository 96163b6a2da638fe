"""The sizes that bound a batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpac.contract.arrays import Served, cdiv
from rpac.contract.attention import Attention, first_seen
from rpac.errors import SelectionError

_OF_MODEL = ("sliding_window", "attention_chunk", "layer", "few_keys")  # a manifest has them where it has the model


@dataclass(frozen=True)
class Limits:
    """What a built program can take. Comes from a spec, or from the manifest of a bundle where no spec is at hand.

    With `sliding_window` or `attention_chunk` the pages before the first token that any new token of a row sees are never
    read: their entries in its page table may hold anything. With `few_keys` a row may have fewer tokens in the cache than
    queries, because each query sees all of them and none is written: cross attention to a short source. `layer` is
    the kind of layers that this is so for, of a model that has several kinds.
    """

    page_size: int
    pages_per_seq: int
    max_num_seqs: int
    num_pages: int
    prefill_chunk: int
    token_buckets: tuple[int, ...]
    decode_len: int = 1
    sliding_window: int | None = None
    attention_chunk: int | None = None
    layer: str = ""
    few_keys: bool = False

    @classmethod
    def of(cls, spec: Served) -> Limits:
        """The limits of a spec; of one with several kinds of layers, what holds for all of them."""
        serving = spec.serving
        limits = cls(
            page_size=serving.page_size,
            pages_per_seq=serving.pages_per_seq,
            max_num_seqs=serving.max_num_seqs,
            num_pages=serving.num_pages,
            prefill_chunk=serving.prefill_chunk,
            token_buckets=serving.token_buckets,
            decode_len=serving.decode_len,
        )
        # A spec with one kind of layers has no names for them.
        return limits.of_layers(dict(getattr(spec, "layers", ())) or {getattr(spec, "layer", ""): spec.model})

    @classmethod
    def joint(cls, limits: Sequence[Limits]) -> Limits:
        """The limits of several kinds of layers that share page tables: a page is needed while one of them reads it.

        Raises ValueError where there are none, or they differ in anything else than in what their layers see.
        """
        first = limits[0] if limits else None
        if first is None or any(one._of(first) != first for one in limits):
            raise ValueError("found limits of several bundles, or none; must be those of the layers of one bundle")
        if len(limits) == 1:
            return first
        windows, chunks = [one.sliding_window for one in limits], {one.attention_chunk for one in limits}
        return replace(
            first,
            sliding_window=max((one for one in windows if one is not None), default=None)
            if None not in windows
            else None,
            attention_chunk=chunks.pop() if len(chunks) == 1 else None,
            layer="",
            few_keys=all(one.few_keys for one in limits),
        )

    def of_layers(self, kinds: Mapping[str, Attention]) -> Limits:
        """These limits for all of some kinds of layers, by name."""
        return self.joint(
            [
                replace(
                    self,
                    sliding_window=one.sliding_window,
                    attention_chunk=one.attention_chunk,
                    layer=name,
                    few_keys=not one.causal and not one.update_cache,
                )
                for name, one in kinds.items()
            ]
        )

    def _of(self, other: Limits) -> Limits:
        """These limits for the layers of others."""
        return replace(self, **{name: getattr(other, name) for name in _OF_MODEL})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Limits:
        """The inverse of `as_dict`. Raises ValueError, naming the entry, where `data` is anything else."""
        names = [field.name for field in fields(cls) if field.name not in _OF_MODEL]
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
        """Plain data for a manifest, which says elsewhere what each kind of layers sees; a `decode_len` of 1 is not in it, so
        that it is as it was before there were others.
        """
        data = {**asdict(self), "token_buckets": list(self.token_buckets)}
        return {
            name: value for name, value in data.items() if name not in _OF_MODEL and (name, value) != ("decode_len", 1)
        }

    @property
    def max_kv_len(self) -> int:
        """Tokens that a full page table holds."""
        return self.page_size * self.pages_per_seq

    @property
    def is_local(self) -> bool:
        """Whether there are tokens that do not see their sequence from its start."""
        return self.sliding_window is not None or self.attention_chunk is not None

    def first_entries(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first entry of its page table that a row reads whose first new token is at each of `positions`."""
        return first_seen(positions, self.sliding_window, self.attention_chunk) // self.page_size

    def most_pages(self, tokens: int) -> int:
        """The most pages that a sequence of `tokens` tokens needs at once, given in steps of a prefill chunk at most."""
        whole, seen = cdiv(tokens, self.page_size), self.sliding_window or self.attention_chunk
        if seen is None:
            return whole
        # In front of a step's last token lie what its first one sees and the rest of the step, on whole pages.
        return min(whole, cdiv(seen - 1 + self.prefill_chunk, self.page_size) + 1)

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
