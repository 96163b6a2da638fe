"""What a client gets: the bodies of OpenAI's completion answers, whole or as server-sent events, and of errors."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

DONE = b"data: [DONE]\n\n"


class Completion:
    """The bodies of one answer of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, prompt_tokens: int, with_ids: bool) -> None:
        self._head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}
        self._prompt_tokens = prompt_tokens
        self._with_ids = with_ids

    def whole(self, text: str, reason: str, ids: Sequence[int]) -> dict[str, Any]:
        """The answer in one piece. `ids` are the new tokens, the one that ended it included."""
        choice = self._choice(reason, ids, self._message(text))
        return {**self._head, "object": self.whole_object, "choices": [choice], "usage": self._usage(len(ids))}

    def first(self) -> list[dict[str, Any]]:
        """The chunks before the first text."""
        return []

    def chunk(self, text: str, reason: str, ids: Sequence[int]) -> dict[str, Any]:
        """Some more text and its tokens, and why it was the last if `reason` is not empty."""
        return self._chunk([self._choice(reason, ids, self._delta(text))])

    def usage(self, tokens: int) -> dict[str, Any]:
        """The chunk behind the last."""
        return {**self._chunk([]), "usage": self._usage(tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _choice(self, reason: str, ids: Sequence[int], text: dict[str, Any]) -> dict[str, Any]:
        shown = {"token_ids": list(ids)} if self._with_ids else {}
        return {"index": 0, **text, "logprobs": None, "finish_reason": reason or None, **shown}

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt = self._prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


class Chat(Completion):
    """The bodies of one answer of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self) -> list[dict[str, Any]]:
        return [self._chunk([self._choice("", (), {"delta": {"role": "assistant", "content": ""}})])]

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def event(data: object) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
