"""What a client asks for: the bodies of OpenAI's completion requests, checked.

Parameters that would change an answer, and that this server does not have, are refused by name. Those that would not are
ignored.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.generate import Request

MOST_STOPS = 4
DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it; a chat may use all the room that is left
# Parameters that this server does not have, with the values that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}
ROLES = ("system", "developer", "user", "assistant")


class Invalid(Exception):
    """A request that the server cannot answer, and the parameter that is wrong."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


@dataclass(frozen=True)
class Asked:
    """A request, but for its tokens. `prompt` is a text or token ids; `messages` are those of a chat in its place.

    `with_ids` is `return_token_ids`, which vLLM has too: the choices of an answer then hold the new tokens as `token_ids`.
    """

    prompt: str | Sequence[int]
    messages: Sequence[Mapping[str, str]] | None
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stops: tuple[str, ...]
    is_streamed: bool
    with_usage: bool
    with_ids: bool

    def request(self, prompt: Sequence[int], ends: frozenset[int]) -> Request:
        """What the generator takes, with the tokens of the prompt."""
        return Request(prompt, self.max_tokens, self.temperature, self.top_p, self.seed, ends)


def read_completion(body: bytes, model: str) -> Asked:
    """A request to /v1/completions. Raises Invalid."""
    data = _body(body, model)
    count = _integer(data, "max_tokens", 1)
    return _asked(data, _prompt(data), None, DEFAULT_TOKENS if count is None else count)


def read_chat(body: bytes, model: str) -> Asked:
    """A request to /v1/chat/completions. Raises Invalid."""
    data = _body(body, model)
    name = "max_tokens" if data.get("max_completion_tokens") is None else "max_completion_tokens"
    return _asked(data, "", _messages(data), _integer(data, name, 1))


def _asked(
    data: Mapping[str, Any],
    prompt: str | Sequence[int],
    messages: Sequence[Mapping[str, str]] | None,
    max_tokens: int | None,
) -> Asked:
    options = data.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Invalid("stream_options must be an object", "stream_options")
    seed = _integer(data, "seed", -(1 << 63))
    return Asked(
        prompt=prompt,
        messages=messages,
        max_tokens=max_tokens,
        temperature=_number(data, "temperature", 1.0, 0.0, 2.0),
        top_p=_top_p(data),
        seed=secrets.randbits(32) if seed is None else seed % (1 << 32),
        stops=_stops(data),
        is_streamed=_flag(data, "stream"),
        with_usage=_flag(options, "include_usage"),
        with_ids=_flag(data, "return_token_ids"),
    )


def _body(body: bytes, model: str) -> Mapping[str, Any]:
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise Invalid(f"the body is {body[:80].decode(errors='replace')!r}; must be a JSON object")
    if not isinstance(data.get("model"), str):
        raise Invalid(f"model must be given; this server has {model!r}", "model")
    if data["model"] != model:
        raise Invalid(f"model {data['model']!r:.80} does not exist; must be {model!r}", "model", "model_not_found", 404)
    for name, off in UNSUPPORTED.items():
        if name in data and data[name] not in off:
            raise Invalid(
                f"{name} is {data[name]!r:.80}; this server does not have it: leave it out", name, "unsupported"
            )
    return data


def _prompt(data: Mapping[str, Any]) -> str | list[int]:
    prompt = data.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(one) is int for one in prompt):
        return prompt
    raise Invalid("prompt must be one text, or one list of token ids", "prompt")


def _messages(data: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Invalid("messages must be a list with one message at least", "messages")
    found = []
    for index, one in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(one, dict) or one.get("role") not in ROLES:
            raise Invalid(f"{where} must be an object with a role: one of {', '.join(ROLES)}", where)
        found.append({"role": one["role"], "content": _content(one.get("content"), f"{where}.content")})
    return found


def _content(content: Any, where: str) -> str:
    """A text, or the texts of several parts together."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Invalid(f"{where} must be a text, or a list of parts of the type text", where)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Invalid(f"{where} has a part that is no text; this server takes texts alone", where)
    return "".join(part["text"] for part in parts)


def _stops(data: Mapping[str, Any]) -> tuple[str, ...]:
    stops = data.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(one, str) and one for one in stops):
        raise Invalid(f"stop must be a text, or a list of up to {MOST_STOPS}, none of them empty", "stop")
    return tuple(stops)


def _top_p(data: Mapping[str, Any]) -> float:
    found = _number(data, "top_p", 1.0, 0.0, 1.0)
    if found == 0:
        raise Invalid("top_p is 0; must be above 0 (for the likeliest token, give a temperature of 0)", "top_p")
    return found


def _integer(data: Mapping[str, Any], name: str, low: int) -> int | None:
    value = data.get(name)
    if value is not None and (type(value) is not int or not low <= value < 1 << 63):
        raise Invalid(f"{name} is {value!r:.80}; must be an integer from {low} on", name)
    return value


def _number(data: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = data.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise Invalid(f"{name} is {value!r:.80}; must be a number from {low:g} to {high:g}", name)
    return float(value)


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    if value is not None and type(value) is not bool:
        raise Invalid(f"{name} is {value!r:.80}; must be true or false", name)
    return bool(value)
