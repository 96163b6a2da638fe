"""What must not change an answer: the order of sequences, the numbers of pages, where a prefill is cut, which program runs.

On the portable programs, compiled once a spec and a kind; the kernels are held against the same oracle elsewhere.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from rpac.check.arrays import Arguments, make_arguments
from rpac.check.batches import CheckBatch
from rpac.check.execute import prepare_run
from rpac.contract import arrays as layout
from rpac.kernels import render
from rpac.plan import plan_spec
from rpac.spec import Spec, parse_spec
from rpac.spec.support import FEATURES, text_of

SMALL = {
    "model": {"q_heads": 4, "kv_heads": 2},
    "serving": {
        "page_size": 16, "max_model_len": 128, "max_num_tokens": 32, "token_buckets": "[32]", "max_num_seqs": 4,
        "prefill_chunk": 16, "context_lens": "[64]",
    },
}  # fmt: skip
WINDOW = {"model": {"sliding_window": 21}}
SPECS = {
    "plain": (FEATURES["float32"],),
    "bfloat16": (),
    "window, soft cap and sinks": (FEATURES["float32"], WINDOW, FEATURES["soft cap"], FEATURES["sinks"]),
    "int8, separate K and V": (FEATURES["int8 KV"], FEATURES["separate K and V"], {"serving": {"page_size": 32}}),
    "head_dim 64 of float8": (FEATURES["float8_e4m3fn KV"], FEATURES["head_dim 64"]),
}
PAGES = 40
SEEDS = range(3)


@cache
def spec_of(name: str) -> Spec:
    return parse_spec(text_of(SMALL, *SPECS[name]), "small.yaml")


@cache
def runner(name: str, kind: str) -> Any:
    spec = spec_of(name)
    plan = next(plan for plan in plan_spec(spec, "cpu") if plan.kind == kind)
    return prepare_run(plan, render(spec, plan), 100)


def attend(name: str, kind: str, args: Arguments) -> tuple[np.ndarray, np.ndarray]:
    found = runner(name, kind)(args, "compiled")
    assert found.out is not None and found.kv_cache is not None, found.notes
    return np.asarray(found.out, np.float32)[: args.cu_q_lens[args.distribution[2]]], np.asarray(found.kv_cache)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"uint{8 * array.itemsize}")


def batch(name: str, seed: int, q_lens: tuple[int, ...] = ()) -> tuple[Arguments, np.random.Generator]:
    """Random rows, all of them mixed ones."""
    rng = np.random.default_rng(seed)
    print("seed", seed)
    q_lens = q_lens or tuple(int(n) for n in rng.integers(1, 9, 4))
    batch = CheckBatch("random", q_lens, tuple(int(q + rng.integers(0, 128 - q)) for q in q_lens), 0)
    return make_arguments(spec_of(name), batch, 32, PAGES, rng), rng


def close(name: str, one: np.ndarray, other: np.ndarray) -> None:
    """Sums in another order: of float32 within its rounding, of others within that of the weights and the output."""
    tolerance = 1e-5 if spec_of(name).model.q_dtype == "float32" else 2e-2
    assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(one)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SPECS)
def test_sequences_in_another_order(name: str, seed: int) -> None:
    args, rng = batch(name, seed)
    order = rng.permutation(4)
    q_lens = np.diff(args.cu_q_lens)[:4]
    rows = np.concatenate([np.arange(args.cu_q_lens[row], args.cu_q_lens[row + 1]) for row in order])
    tokens = np.concatenate([rows, np.arange(len(rows), len(args.queries))])
    moved = args._replace(
        by_token={key: array[tokens] for key, array in args.by_token.items()},
        kv_lens=args.kv_lens[order],
        page_indices=args.page_indices.reshape(4, -1)[order].ravel(),
        cu_q_lens=np.concatenate([[0], np.cumsum(q_lens[order])]).astype(np.int32),
    )
    out, kv_cache = attend(name, "mixed", args)
    moved_out, moved_cache = attend(name, "mixed", moved)
    close(name, out[rows], moved_out)
    assert np.array_equal(bits(kv_cache), bits(moved_cache))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SPECS)
def test_pages_with_other_numbers(name: str, seed: int) -> None:
    args, rng = batch(name, seed)
    number = rng.permutation(PAGES)  # the new one of each page
    live = (args.page_indices >= 0) & (args.page_indices < PAGES)
    kv_cache = np.empty_like(args.kv_cache)
    kv_cache[number] = args.kv_cache
    table = np.where(live, number[np.where(live, args.page_indices, 0)], args.page_indices).astype(np.int32)
    out, after = attend(name, "mixed", args)
    moved_out, moved_after = attend(name, "mixed", args._replace(kv_cache=kv_cache, page_indices=table))
    assert np.array_equal(out, moved_out)
    assert np.array_equal(bits(after), bits(moved_after[number]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SPECS)
def test_a_prefill_that_is_cut_in_two(name: str, seed: int) -> None:
    args, rng = batch(name, seed, (int(np.random.default_rng(seed).integers(2, 30)),))
    count = int(args.cu_q_lens[1])
    cut = int(rng.integers(1, count))
    whole, whole_cache = attend(name, "mixed", args)

    def part(start: int, end: int, kv_cache: np.ndarray) -> Arguments:
        new = {
            key: np.concatenate([array[start:end], array[end:], array[:start]]) for key, array in args.by_token.items()
        }
        ends = args.cu_q_lens.copy()
        ends[1] = end - start
        lens = args.kv_lens.copy()
        lens[0] -= count - end
        return args._replace(by_token=new, kv_cache=kv_cache, cu_q_lens=ends, kv_lens=lens)

    first, kv_cache = attend(name, "mixed", part(0, cut, args.kv_cache))
    second, kv_cache = attend(name, "mixed", part(cut, count, kv_cache))
    close(name, whole, np.concatenate([first, second]))
    assert np.array_equal(bits(whole_cache), bits(kv_cache))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SPECS)
def test_decode_rows_in_the_mixed_program(name: str, seed: int) -> None:
    args, _ = batch(name, seed, (1, 1, 1, 1))
    decode = args._replace(distribution=np.array([4, 4, 4], np.int32))
    out, kv_cache = attend(name, "decode", decode)
    for distribution in ([4, 4, 4], [2, 2, 4], [0, 0, 4]):
        mixed, mixed_cache = attend(name, "mixed", args._replace(distribution=np.array(distribution, np.int32)))
        close(name, out, mixed)
        assert np.array_equal(bits(kv_cache), bits(mixed_cache))


def test_the_specs_are_what_they_are_called() -> None:
    assert spec_of("int8, separate K and V").serving.kv_layout == "separate"
    assert layout.kv_page_shape(spec_of("plain")) == (16, 4, 1, 128)
