"""The endpoints speak OpenAI's language, say what is wrong with a request, and outlive clients that go and steps that fail."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from clients import MODEL, PROMPT, body, completed, events, metrics_of, running, streamed, tokens_of, until
from serve.api import MAX_BODY
from serve.generate import Generator
from serve.text import Text
from serve.worker import Worker
from served import NUM_PAGES

Test = Callable[[aiohttp.ClientSession, Worker], Awaitable[None]]
Against = Callable[..., None]


@pytest.fixture
def against(generator: Generator, text: Text) -> Against:
    """Runs a test against a server."""

    def run(test: Test, most_waiting: int = 100) -> None:
        async def main() -> None:
            worker = Worker(generator, most_waiting)
            async with running(worker, text) as (session, _):
                await asyncio.wait_for(test(session, worker), 60)

        asyncio.run(main())

    return run


def test_an_answer_in_one_piece_is_that_in_events(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        whole = await completed(session, "Once upon", 12)
        [choice] = whole["choices"]
        assert (whole["object"], whole["model"], whole["id"][:5]) == ("text_completion", MODEL, "cmpl-")
        assert whole["usage"] == {"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22}
        assert (choice["index"], choice["finish_reason"], len(choice["token_ids"])) == (0, "length", 12)
        *chunks, usage, done = await streamed(session, "Once upon", 12, stream_options={"include_usage": True})
        assert done == "[DONE]"
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
        assert "".join(one["choices"][0]["text"] for one in chunks) == choice["text"]
        assert [token for one in chunks for token in one["choices"][0]["token_ids"]] == choice["token_ids"]
        assert [one["choices"][0]["finish_reason"] for one in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert {(one["object"], one["id"]) for one in chunks} == {("text_completion", usage["id"])}
        both = await asyncio.gather(tokens_of(session, "Once upon", 12), tokens_of(session, [7] * 40, 3))
        assert both[0] == choice["token_ids"]
        assert len(both[1]) == 3

    against(test)


def test_a_chat_is_answered_in_one_piece_and_in_events(against: Against, text: Text) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}]
        asked = {"model": MODEL, "messages": messages, "temperature": 0, "max_completion_tokens": 6}
        async with session.post("/v1/chat/completions", json=asked) as response:
            whole = await response.json()
        [choice] = whole["choices"]
        assert whole["object"] == "chat.completion"
        assert choice["message"]["role"] == "assistant"
        prompt = text.encode_chat([{"role": "user", "content": "Hi!"}])
        assert whole["usage"]["prompt_tokens"] == len(prompt)
        assert choice["message"]["content"] == (await completed(session, prompt, 6))["choices"][0]["text"]
        async with session.post("/v1/chat/completions", json={**asked, "stream": True}) as response:
            first, *chunks, done = await events(response)
        assert (first["object"], done) == ("chat.completion.chunk", "[DONE]")
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        found = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks)
        assert found == choice["message"]["content"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    against(test)


def test_an_answer_ends_before_a_stop_string_and_gives_its_pages_back(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        whole = (await completed(session, "abc", 40))["choices"][0]["text"]
        stop = whole[5:7]
        [choice] = (await completed(session, "abc", 40, stop=[stop, "never"]))["choices"]
        assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
        await until(worker, running=0, free_pages=NUM_PAGES)

    against(test)


def test_an_answer_ends_at_an_end_token_that_is_not_shown(
    against: Against, generator: Generator, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        [whole] = (await completed(session, "abc", 8))["choices"]
        end = whole["token_ids"][3]
        monkeypatch.setattr(text, "ends", frozenset({end}))
        answer = await completed(session, "abc", 8)
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["token_ids"] == whole["token_ids"][: whole["token_ids"].index(end) + 1]
        assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
        assert choice["text"] == (await completed(session, "abc", len(choice["token_ids"]) - 1))["choices"][0]["text"]
        await until(worker, running=0, free_pages=NUM_PAGES)

    against(test)


def test_a_seed_repeats_an_answer_whatever_else_runs(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        warm = {"temperature": 1.0, "top_p": 0.9, "count": 12}
        first = await tokens_of(session, seed=5, **warm)
        others = [tokens_of(session, [n] * 20, seed=n, **warm) for n in range(6)]
        again, *_ = await asyncio.gather(tokens_of(session, seed=5, **warm), *others)
        assert again == first
        assert await tokens_of(session, seed=6, **warm) != first
        assert await tokens_of(session, **warm) != await tokens_of(session, **warm)

    against(test)


BAD: list[tuple[bytes, int, str, str | None]] = [
    (b"x", 400, "the body is 'x'; must be a JSON object", None),
    (b"[" * 100_000, 400, "must be a JSON object", None),
    (b"\xff", 400, "must be a JSON object", None),
    (b'{"prompt": "a"}', 400, "model must be given; this server has 'small'", "model"),
    (b'{"model": "other"}', 404, "model 'other' does not exist; must be 'small'", "model"),
    (b'{"model": "small"}', 400, "prompt must be one text, or one list of token ids", "prompt"),
    (b'{"model": "small", "prompt": ["a", "b"]}', 400, "prompt must be one text", "prompt"),
    (b'{"model": "small", "prompt": [1, true]}', 400, "prompt must be one text", "prompt"),
    (b'{"model": "small", "prompt": [1, 512]}', 400, "prompt[1] is 512; must be a token from 0 to 260", "prompt"),
    (b'{"model": "small", "prompt": []}', 400, "tokens are empty; must be one at least", None),
    (b'{"model": "small", "prompt": "a", "n": 2}', 400, "n is 2; this server does not have it: leave it out", "n"),
    (b'{"model": "small", "prompt": "a", "logprobs": 5}', 400, "logprobs is 5; this server does not", "logprobs"),
    (b'{"model": "small", "prompt": "a", "max_tokens": "8"}', 400, "max_tokens is '8'; must be an int", "max_tokens"),
    (b'{"model": "small", "prompt": "a", "max_tokens": 0}', 400, "must be an integer from 1 on", "max_tokens"),
    (b'{"model": "small", "prompt": "a", "max_tokens": 128}', 400, "at most 129 in all", None),
    (b'{"model": "small", "prompt": "a", "temperature": 3}', 400, "must be a number from 0 to 2", "temperature"),
    (b'{"model": "small", "prompt": "a", "temperature": NaN}', 400, "must be a number from 0 to 2", "temperature"),
    (b'{"model": "small", "prompt": "a", "top_p": 0}', 400, "top_p is 0; must be above 0", "top_p"),
    (b'{"model": "small", "prompt": "a", "stop": [""]}', 400, "stop must be a text, or a list of up to 4", "stop"),
    (b'{"model": "small", "prompt": "a", "stream": 1}', 400, "stream is 1; must be true or false", "stream"),
    (b" " * (MAX_BODY + 1), 413, "Maximum request body size 1048576 exceeded", None),
]


def test_a_bad_request_is_told_what_is_wrong_and_harms_nobody(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        other = asyncio.create_task(tokens_of(session, PROMPT, 60))
        for data, status, message, param in BAD:
            async with session.post("/v1/completions", data=io.BytesIO(data)) as response:
                error = (await response.json())["error"]
                assert (response.status, error["type"], error["param"]) == (status, "invalid_request_error", param)
                assert message in error["message"]
        async with session.get("/v1/completions") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
        async with session.get("/nowhere") as response:
            assert (response.status, set(await response.json())) == (404, {"error"})
        assert len(await other) == 60

    against(test)


BAD_CHATS: list[tuple[Any, str, str]] = [
    (None, "messages must be a list with one message at least", "messages"),
    ([], "messages must be a list with one message at least", "messages"),
    ([{"role": "poet", "content": "a"}], "messages[0] must be an object with a role", "messages[0]"),
    ([{"role": "user", "content": 5}], "messages[0].content must be a text", "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "takes texts alone", "messages[0].content"),
]


def test_a_bad_chat_is_told_what_is_wrong(against: Against, text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        for messages, message, param in BAD_CHATS:
            asked = {"model": MODEL, "messages": messages}
            async with session.post("/v1/chat/completions", json=asked) as response:
                error = (await response.json())["error"]
                assert (response.status, error["param"]) == (400, param)
                assert message in error["message"]
        monkeypatch.setattr(text, "_template", None)
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
        async with session.post("/v1/chat/completions", json=asked) as response:
            assert response.status == 400
            assert "has no chat template" in (await response.json())["error"]["message"]

    against(test)


def test_models_health_and_metrics(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        async with session.get("/v1/models") as response:
            [found] = (await response.json())["data"]
            assert (found["id"], found["object"], found["max_model_len"]) == (MODEL, "model", 129)
        async with session.get(f"/v1/models/{MODEL}") as response:
            assert await response.json() == found
        async with session.get("/v1/models/a/b") as response:
            assert response.status == 404
        async with session.get("/health") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok"})
        await tokens_of(session, PROMPT, 5)
        await until(worker, running=0, free_pages=NUM_PAGES)
        found = await metrics_of(session)
        assert found['serve_requests_total{path="/v1/completions",status="200"}'] == 1
        assert (found["serve_generated_tokens_total"], found["serve_prompt_tokens_total"]) == (5, 3)
        assert (found["serve_first_token_seconds_count"], found["serve_next_token_seconds_count"]) == (1, 4)
        assert (found["serve_free_pages"], found["serve_pages"]) == (NUM_PAGES, NUM_PAGES)

    against(test)


def test_the_pages_of_a_client_that_goes_are_free_again(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        async with session.post("/v1/completions", json=body(count=120, stream=True)) as response:
            await response.content.readline()
            response.close()
        await until(worker, running=0, waiting=0, free_pages=NUM_PAGES)
        assert len(await tokens_of(session, PROMPT, 2)) == 2

    against(test)


def test_a_client_that_goes_while_it_waits_is_forgotten(against: Against, generator: Generator) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        long = [asyncio.create_task(tokens_of(session, [n] * 100, 10)) for n in range(5)]  # 7 pages each, of 24
        await until(worker, accepted=5)
        gone = asyncio.create_task(tokens_of(session, [9] * 100, 10))
        await until(worker, accepted=6)  # behind two others, because only three run at a time
        gone.cancel()
        assert [len(answer) for answer in await asyncio.gather(*long)] == [10] * 5
        assert generator.totals.tokens == 5 * 10
        await until(worker, running=0, waiting=0, free_pages=NUM_PAGES)

    against(test)


def test_a_server_with_too_much_to_do_says_so(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        found = await asyncio.gather(*(post(session, n) for n in range(30)))
        refused = [answer for status, answer in found if status == 503]
        assert {answer["error"]["message"] for answer in refused} == {"2 requests wait already; try again later"}
        assert {status for status, _ in found} == {200, 503}

    async def post(session: aiohttp.ClientSession, n: int) -> tuple[int, Any]:
        async with session.post("/v1/completions", json=body([n] * 60, 40)) as response:
            return response.status, await response.json()

    against(test, most_waiting=2)


def test_after_a_step_that_failed_the_server_goes_on(
    against: Against, generator: Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(session: aiohttp.ClientSession, worker: Worker) -> None:
        want = await tokens_of(session)
        with monkeypatch.context() as patch:
            patch.setattr(generator, "_sampling", fail)
            assert (await completed(session))["error"]["message"] == "a step failed on the server; try again"
        assert await tokens_of(session) == want
        await until(worker, running=0, waiting=0, free_pages=NUM_PAGES)

    def fail(step: Any) -> Any:
        raise RuntimeError("no device")

    against(test)
    assert "no device" in caplog.text


def test_a_server_that_ends_finishes_what_runs_and_takes_nothing_new(generator: Generator, text: Text) -> None:
    async def run() -> None:
        worker = Worker(generator, most_waiting=100)
        async with running(worker, text) as (session, _):
            answer = asyncio.create_task(tokens_of(session, PROMPT, 60))
            await until(worker, running=1)
            draining = asyncio.create_task(asyncio.to_thread(worker.drain, 60))
            while worker.is_serving:
                await asyncio.sleep(0.001)
            async with session.get("/health") as response:
                assert response.status == 503
            assert (await completed(session))["error"]["message"] == "the server ends; ask another one"
            assert len(await answer) == 60
            assert await draining

    asyncio.run(run())


def test_a_server_that_must_end_says_so_to_those_who_wait(generator: Generator, text: Text) -> None:
    async def run() -> None:
        worker = Worker(generator, most_waiting=100)
        async with running(worker, text) as (session, _):
            answer = asyncio.create_task(streamed(session, PROMPT, 120))
            await until(worker, running=1)
            assert not await asyncio.to_thread(worker.drain, 0)
            await asyncio.to_thread(worker.stop)
            assert (await answer)[-1]["error"]["message"] == "the server ends; ask another one"

    asyncio.run(run())
    assert generator.scheduler.tables.num_free == NUM_PAGES
