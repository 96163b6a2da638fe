"""Every step is a sound batch within its budget, the oldest always moves on, and every token is computed in its place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpac.batch import Batch, Limits
from rpac.contract.attention import first_seen
from rpac.errors import BatchError, PageError
from rpac.serving import Scheduler, Step, query_positions, split_budget

LIMITS = Limits(page_size=4, pages_per_seq=6, max_num_seqs=5, num_pages=9, prefill_chunk=5, token_buckets=(4, 12))
SHAPES = [
    LIMITS,
    Limits(page_size=1, pages_per_seq=24, max_num_seqs=3, num_pages=30, prefill_chunk=1, token_buckets=(3,)),
    Limits(page_size=16, pages_per_seq=3, max_num_seqs=9, num_pages=2, prefill_chunk=20, token_buckets=(8, 9, 64)),
    Limits(page_size=4, pages_per_seq=8, max_num_seqs=8, num_pages=7, prefill_chunk=9, token_buckets=(2,)),
]
SHAPES += [replace(SHAPES[at], sliding_window=window) for at, window in ((0, 1), (0, 6), (1, 3), (2, 17), (3, 5))]
SHAPES += [replace(SHAPES[at], attention_chunk=chunk) for at, chunk in ((0, 8), (1, 4), (3, 4))]
VOCABULARY = 50


def next_token(tokens: Sequence[int], limits: Limits) -> int:
    """Depends on every token that the last one sees and its place, so that one that was computed wrongly shows in those
    that follow.
    """
    start = first_seen(len(tokens) - 1, limits.sliding_window, limits.attention_chunk)
    return sum((index + 1) * tokens[index] for index in range(start, len(tokens))) % VOCABULARY


class Model:
    """Stands in for a model: its cache holds tokens, which it reads back through the batch's page tables."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.page_size = limits.page_size
        self.cache = np.full((limits.num_pages, limits.page_size), -1)

    def __call__(self, step: Step) -> list[int]:
        self.cache[step.copies[:, 1]] = self.cache[step.copies[:, 0]]
        wanted = {}
        for row in step.batch:
            pages = list(row.pages)
            for query, position in zip(row.queries, range(row.context_len, row.kv_len), strict=True):
                assert step.positions[query] == position
                self.cache[pages[position // self.page_size], position % self.page_size] = step.token_ids[query]
            wanted[row.queries[-1]] = next_token(self.cache[pages].reshape(-1)[: row.kv_len].tolist(), self.limits)
        assert not step.token_ids[step.batch.num_tokens :].any()
        return [wanted[query] for query in step.samples.tolist()]


def continued(prompt: Sequence[int], count: int, limits: Limits = LIMITS) -> list[int]:
    """What a model without any cache makes of a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, limits))
    return tokens[len(prompt) :]


class Server:
    """Runs a scheduler to its end and keeps what came out."""

    def __init__(self, limits: Limits = LIMITS, **options: Any) -> None:
        self.scheduler = Scheduler(limits, **options)
        self.model = Model(limits)
        self.answers: dict[int, list[int]] = {}
        self.steps: list[Step] = []

    def add(self, prompt: Sequence[int], count: int) -> int:
        name = self.scheduler.add(prompt, count)
        self.answers[name] = []
        return name

    def step(self) -> Step | None:
        step = self.scheduler.step()
        if step is not None:
            self.steps.append(step)
            tokens = self.model(step)
            for name, token in zip(step.sampled, tokens, strict=True):
                self.answers[name].append(token)
            self.scheduler.commit(step, tokens)
        return step

    def finish(self) -> None:
        while self.step() is not None:
            pass
        assert self.scheduler.tables.num_free == self.scheduler.limits.num_pages
        assert (self.scheduler.running, self.scheduler.waiting, len(self.scheduler.tables)) == ((), (), 0)


# Few different tokens and common starts, so that prompts share prefixes of all lengths.
PROMPTS = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
    st.integers(1, 14).map(lambda size: [1] * size),
    st.integers(0, 5).map(lambda size: [1, 2, 3, 4, 1, 2, 3, 4, 1][: 9 - size] + [7] * size),
)
REQUESTS = st.lists(st.tuples(PROMPTS, st.integers(1, 9), st.integers(0, 4)), max_size=14)


@given(REQUESTS, st.sampled_from(SHAPES), st.booleans())
def test_every_answer_is_that_of_a_model_without_a_cache(requests: Any, limits: Limits, share: bool) -> None:
    server = Server(limits, share_prefixes=share)
    wanted = {}
    for prompt, count, pause in requests:
        wanted[server.add(prompt, count)] = continued(prompt, count, limits)
        for _ in range(pause):
            server.step()
    server.finish()
    assert server.answers == wanted
    if not share:
        assert not any(step.shared or len(step.copies) for step in server.steps)


@given(REQUESTS, st.sampled_from(SHAPES))
def test_every_step_is_within_the_limits_and_moves_the_oldest_on(requests: Any, limits: Limits) -> None:
    server = Server(limits)
    for prompt, count, pause in requests:
        server.add(prompt, count)
        for _ in range(pause):
            check_step(server)
    while check_step(server):
        pass


def check_step(server: Server) -> bool:
    live = sorted([*server.scheduler.running, *server.scheduler.waiting])
    step = server.step()
    assert (step is None) == (not live)
    if step is None:
        return False
    batch, limits = step.batch, server.scheduler.limits
    Batch.of_arrays(limits, batch.tokens, batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    assert live[0] in step.sequences
    assert not set(step.preempted) & set(step.sequences)
    assert 1 <= batch.num_tokens <= limits.token_buckets[-1]
    assert all(row.q_len <= limits.prefill_chunk for row in batch)
    assert len(set(step.sequences)) == len(batch) <= limits.max_num_seqs
    running, waiting = server.scheduler.running, server.scheduler.waiting
    assert list(running) == sorted(running)
    assert list(waiting) == sorted(waiting)
    assert not running or not waiting or running[-1] < waiting[0]  # nobody is overtaken
    return True


def test_a_pool_that_runs_out_preempts_the_youngest_and_computes_it_again() -> None:
    server = Server()
    for first in range(3):
        server.add([10 + first, *range(8)], 12)
    server.finish()
    preempted = [name for step in server.steps for name in step.preempted]
    assert preempted
    assert 1 not in preempted
    assert server.answers == {1 + n: continued([10 + n, *range(8)], 12) for n in range(3)}


def test_decode_goes_on_while_a_prompt_is_computed_in_chunks() -> None:
    server = Server()
    first = server.add([1, 2], 8)
    server.step()
    second = server.add(list(range(12)), 1)
    rows = []
    while second in [*server.scheduler.running, *server.scheduler.waiting]:
        step = server.step()
        assert step is not None
        rows.append({step.sequences[row.row]: (row.kind, row.q_len) for row in step.batch})
    chunk, rest = ("prefill", 5), ("mixed", 2)
    assert rows == [{first: ("decode", 1), second: one} for one in (chunk, chunk, rest)]


def test_a_common_prefix_is_computed_once() -> None:
    prefix = [5, 6, 7, 8, 9, 1]
    server = Server()
    first = server.add([*prefix, 2, 3], 5)
    for _ in range(3):
        server.step()
    server.add([*prefix, 9], 2)
    step = server.step()
    assert step is not None
    assert step.shared == len(prefix)
    assert len(step.copies) == 1  # the page with the last two tokens of the prefix
    assert server.scheduler.running[0] == first
    server.finish()
    assert server.answers[2] == continued([*prefix, 9], 2)


def test_a_sequence_may_be_removed_at_any_time() -> None:
    server = Server()
    names = [server.add([n, *range(6)], 6) for n in range(6)]
    step = server.scheduler.step()
    assert step is not None
    server.scheduler.remove(names[0])  # it runs
    server.scheduler.remove(names[5])  # it waits
    server.scheduler.commit(step, server.model(step))
    with pytest.raises(PageError, match="sequence 1 is not known here; must be one that add returned and that did not"):
        server.scheduler.remove(names[0])
    server.finish()
    assert {name: len(answer) for name, answer in server.answers.items()} == {1: 0, 2: 6, 3: 6, 4: 6, 5: 6, 6: 0}


def test_a_step_that_could_not_run_is_computed_again() -> None:
    server = Server()
    for n in range(3):
        server.add([n, *range(6)], 4)
    server.step()
    step = server.scheduler.step()
    assert step is not None
    server.model.cache[:] = -1  # as where the cache was donated to a call that failed
    server.scheduler.undo(step)
    assert server.scheduler.running == ()
    assert server.scheduler.tables.num_free == LIMITS.num_pages
    server.finish()
    assert server.answers == {1 + n: continued([n, *range(6)], 4) for n in range(3)}


def test_the_longest_sequence_that_fits_is_served_alone() -> None:
    server = Server()
    assert server.scheduler.max_tokens == 25
    server.add([1] * 20, 5)  # 24 tokens in the cache, for the last is not computed
    server.add([2] * 20, 5)
    server.finish()
    assert [len(answer) for answer in server.answers.values()] == [5, 5]


def refused(call: Callable[[Scheduler], object]) -> str:
    scheduler = Scheduler(LIMITS)
    with pytest.raises(BatchError) as raised:
        call(scheduler)
    assert (scheduler.waiting, scheduler.running) == ((), ())
    return str(raised.value)


def test_a_request_that_can_never_run_is_refused_at_once() -> None:
    assert "found 20 tokens and max_new_tokens 6; must be 1 or more new tokens, and at most 25 in all" in refused(
        lambda scheduler: scheduler.add([1] * 20, 6)
    )
    assert "max_new_tokens 0" in refused(lambda scheduler: scheduler.add([1], 0))
    assert "tokens are empty; must be one at least" in refused(lambda scheduler: scheduler.add([], 1))
    assert "tokens[0] is 0.5; must be an integer" in refused(lambda scheduler: scheduler.add([0.5], 1))  # type: ignore[list-item]


def test_a_token_that_is_no_int32_is_refused() -> None:
    assert f"tokens[1] is {2**31}; must be an integer" in refused(lambda scheduler: scheduler.add([1, 2**31], 1))


def test_steps_are_taken_one_after_the_other() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add([1], 3)
    step = scheduler.step()
    assert step is not None
    with pytest.raises(BatchError, match="the last step is neither committed nor undone"):
        scheduler.step()
    with pytest.raises(BatchError, match=r"found 0 tokens; must be 1, one for each of step\.samples"):
        scheduler.commit(step, [])
    scheduler.commit(step, [5])
    with pytest.raises(BatchError, match="the step is not the last one, or was committed or undone already"):
        scheduler.commit(step, [5])


@given(st.lists(st.integers(1, 9)), st.integers(1, 6), st.integers(1, 30))
def test_the_budget_goes_to_decode_and_then_to_the_oldest(left: list[int], chunk: int, budget: int) -> None:
    new = split_budget(np.array(left, np.int64), chunk, budget).tolist()
    expected, remaining = [0] * len(left), budget
    for decode in (True, False):
        for at, count in enumerate(left):
            if (count == 1) == decode:
                expected[at] = min(count, chunk, remaining)
                remaining -= expected[at]
    assert new == expected


def test_positions_are_found_by_the_order_that_the_batch_was_built_in() -> None:
    batch = Batch.build(LIMITS, [3, 1, 5], [2, 7, 0], [[0, 1], [2, 3], [4, 5]])
    sequences, positions = query_positions(batch)
    assert sequences.tolist() == [1, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0]
    assert positions.tolist() == [7, 0, 1, 2, 3, 4, 2, 3, 4, 0, 0, 0]


def test_a_batch_of_nothing_has_no_positions() -> None:
    sequences, positions = query_positions(Batch.build(LIMITS, [], [], []))
    assert sequences.tolist() == positions.tolist() == [0] * 4


def test_neither_jax_nor_the_compiler_is_imported() -> None:
    code = "import sys, rpac.serving; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "yaml", "jinja2", "click", "rpac.spec"} & set(done.stdout.split())


def test_with_a_window_a_cache_shorter_than_the_sequence_is_enough() -> None:
    limits = Limits(
        page_size=4,
        pages_per_seq=50,
        max_num_seqs=2,
        num_pages=7,
        prefill_chunk=5,
        token_buckets=(8,),
        sliding_window=9,
    )
    server = Server(limits)
    prompts = [[token % 5 for token in range(80)], [1] * 60]
    names = [server.add(prompt, 40) for prompt in prompts]
    server.finish()
    assert [server.answers[name] for name in names] == [continued(prompt, 40, limits) for prompt in prompts]
    with pytest.raises(BatchError, match="at most 29 in all"):
        Scheduler(replace(limits, sliding_window=None)).add(prompts[0], 40)


def test_the_limits_of_one_kind_of_layers_are_refused() -> None:
    with pytest.raises(BatchError, match=r"limits are of the layers 'local' alone, .* pass rpac\.Limits\.joint"):
        Scheduler(replace(LIMITS, sliding_window=8, layer="local"))
    Scheduler(replace(LIMITS, layer="global"))
