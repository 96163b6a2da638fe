"""Whether NaN or an infinity in one live row reaches another: a batch with and without it, compared bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rpac.check.arrays import Arguments, Array
from rpac.check.batches import CheckBatch
from rpac.check.compare import Difference, bits, owner, place
from rpac.check.execute import Outcome
from rpac.contract.arrays import TOKEN_AXES, arg_specs, index_of, joins_rows, kv_rows
from rpac.contract.attention import Attention
from rpac.oracle.tolerance import attention_error
from rpac.spec import Spec

VALUES: Final = {"NaN": math.nan, "+Inf": math.inf, "-Inf": -math.inf}
# Of the cache. K and V of latent attention are one vector, whose rotary part is of K alone.
OLD_PARTS: Final = {"grouped": ("old K", "old V"), "latent": ("old latent vectors", "old rotary keys")}


@dataclass(frozen=True)
class Poison:
    """A value in one part of a row: the row's part of an argument by its name, or one of OLD_PARTS.

    It stands in one lane of every head of every token, so that a product with an infinity is one too.
    """

    row: int
    part: str
    value: str

    def __str__(self) -> str:
        return f"{self.value} in {self.part} of row {self.row}"


Poisons = tuple[Poison, ...]  # of one run, at most one a row


def poisons_alone(spec: Spec, batch: CheckBatch) -> tuple[Poisons, ...]:
    """Every part with every value that its dtype has, each in a run of its own: in a decode row, and in one of the others.
    Rows of each sort take turns.
    """
    sorts = (range(batch.decodes), range(batch.decodes, len(batch.q_lens)))
    return tuple(
        (Poison(rows[index % len(rows)], part, value),)
        for index, (part, value) in enumerate(_parts_and_values(spec))
        for rows in sorts
        if rows
    )


def poisons_at_once(spec: Spec, batch: CheckBatch, rng: np.random.Generator) -> Poisons:
    """One run: every second row has poison, from a row and a poison on that are drawn, of each part in turn."""
    found = _parts_and_values(spec)
    first = int(rng.integers(len(found)))
    rows = range(int(rng.integers(2)), len(batch.q_lens), 2)
    return tuple(Poison(row, *found[(first + index) % len(found)]) for index, row in enumerate(rows))


def _parts_and_values(spec: Spec) -> list[tuple[str, str]]:
    """Parts change fastest."""
    model = spec.model
    arrays = arg_specs(spec, 0)
    dtypes = {dims.name: dims.dtype for dims in arrays[: index_of(arrays, "kv_cache")]}
    dtypes |= dict.fromkeys(OLD_PARTS["grouped" if model.rope_dim is None else "latent"], model.kv_dtype)
    return [(part, value) for value in VALUES for part, dtype in dtypes.items() if _holds(dtype, value)]


def _holds(dtype: str, value: str) -> bool:
    """Whether a number of `dtype` can be that. There is no such integer, and float8_e4m3fn has no infinity."""
    if np.issubdtype(np.dtype(dtype), np.integer):
        return False
    held = np.float32(VALUES[value]).astype(dtype).astype(np.float32)
    return np.array_equal(held, np.float32(VALUES[value]), equal_nan=True)


def poisoned(spec: Spec, args: Arguments, poisons: Sequence[Poison]) -> Arguments:
    """The same call with poison in it. Where rows share pages, it is in those too."""
    by_token = {name: array.copy() for name, array in args.by_token.items()}
    kv_cache = args.kv_cache.copy()
    tokens = np.moveaxis(kv_cache, TOKEN_AXES[spec.serving.kv_layout], 1)  # a view
    for poison in poisons:
        value = np.float32(VALUES[poison.value])
        if poison.part in by_token:
            mine = slice(args.cu_q_lens[poison.row], args.cu_q_lens[poison.row + 1])
            by_token[poison.part][mine, ..., 0] = value.astype(by_token[poison.part].dtype)
            continue
        pages, slots = _places(spec, args, poison.row, *_old_tokens(spec.model, args, poison.row))
        held = tokens[pages, slots]
        _lane(spec, held, poison.part)[...] = value.astype(kv_cache.dtype)
        tokens[pages, slots] = held
    return args._replace(by_token=by_token, kv_cache=kv_cache)


def _old_tokens(model: Attention, args: Arguments, row: int) -> tuple[int, int]:
    """The tokens of a row that the cache holds before the call and that some query may see."""
    q_len = int(args.cu_q_lens[row + 1] - args.cu_q_lens[row])
    kv_len = int(args.kv_lens[row])
    return model.first_seen(kv_len - q_len), kv_len - q_len if model.update_cache else kv_len


def _places(spec: Spec, args: Arguments, row: int, start: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The pages of the tokens [start, end) of a row, and where in them they are."""
    page_size = spec.serving.page_size
    table = args.page_indices.reshape(len(args.kv_lens), -1)
    position = np.arange(start, end)
    return table[row, position // page_size], position % page_size


def _lane(spec: Spec, tokens: Array, part: str) -> Array:
    """A view of one lane of a part in `tokens` of a cache, `[tokens, ...]`."""
    model = spec.model
    if model.rope_dim is not None:
        return tokens[:, 0 if part == OLD_PARTS["latent"][0] else model.head_dim]
    is_value = part == OLD_PARTS["grouped"][1]
    rows = tokens.reshape(len(tokens), -1, tokens.shape[-1])[:, : kv_rows(model)]  # a view
    if joins_rows(model):
        return rows[:, :, model.head_dim if is_value else 0]
    if spec.serving.kv_layout == "separate":
        return rows[:, model.kv_heads :, 0] if is_value else rows[:, : model.kv_heads, 0]
    return rows[:, int(is_value) :: 2, 0]


def reach(
    spec: Spec, args: Arguments, clean: Outcome, dirty: Arguments, rows: Sequence[int], found: Outcome
) -> Difference:
    """How far a run of `dirty` is from `clean`, the run of `args`, where it must not be off by a bit: in all but `rows`.

    Of the cache, the new tokens of `rows` do not count; their old ones do, which stay as `dirty` has them.
    """
    if clean.out is None or clean.kv_cache is None or found.out is None or found.kv_cache is None:
        return Difference(math.inf, 0.0, False, found.notes or ("the batch without poison did not run",))
    count = int(args.cu_q_lens[args.distribution[2]])
    others = np.ones(count, bool)
    for row in rows:
        others[args.cu_q_lens[row] : args.cu_q_lens[row + 1]] = False
    want = clean.out[:count][others].astype(np.float32)
    error, _ = attention_error(found.out[:count][others].astype(np.float32), want)
    notes = list(found.notes)
    results = {"attention": (clean.out, found.out), "lse": (clean.lse, found.lse)}
    for name, (before, after) in results.items():
        if before is None or after is None:
            continue
        differs = others & (bits(before[:count]) != bits(after[:count])).reshape(count, -1).any(axis=1)
        if differs.any():
            notes.append(f"{name} of {int(differs.sum())} tokens changes, first {place(args, int(differs.argmax()))}")
    moved = _changed_cache(spec, args, clean.kv_cache, dirty, rows, found.kv_cache)
    if moved.any():
        page, slot = (int(index[0]) for index in np.nonzero(moved))
        notes.append(f"cache changes in {int(moved.sum())} tokens, first {owner(args, page, slot, moved.shape[1])}")
    return Difference(error, 0.0, not moved.any(), tuple(notes))


def _changed_cache(
    spec: Spec, args: Arguments, clean: Array, dirty: Arguments, rows: Sequence[int], found: Array
) -> NDArray[np.bool_]:
    """Which tokens of the cache, `[pages, page_size]`, the poison changed that it may not."""
    was_poisoned = bits(args.kv_cache) != bits(dirty.kv_cache)
    want = np.where(was_poisoned, bits(dirty.kv_cache), bits(clean))
    differs = np.moveaxis(bits(found) != want, TOKEN_AXES[spec.serving.kv_layout], 1)
    moved: NDArray[np.bool_] = differs.any(axis=tuple(range(2, differs.ndim)))
    if spec.model.update_cache:
        for row in rows:
            kv_len = int(args.kv_lens[row])
            q_len = int(args.cu_q_lens[row + 1] - args.cu_q_lens[row])
            moved[_places(spec, args, row, kv_len - q_len, kv_len)] = False
    return moved
