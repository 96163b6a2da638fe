"""Asks a server with the official client of OpenAI, and prints what it got as JSON.

python client.py URL MODEL
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

MESSAGES = [{"role": "user", "content": "Tell me more"}]


def main(url: str, model: str) -> None:
    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    more: Any = {"model": model, "temperature": 0, "seed": 1}
    chat: Any = {**more, "messages": MESSAGES, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**chat)
    chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    completion = client.completions.create(**more, prompt="Once", max_tokens=12, stop=["\u0000\u0000"])
    pieces = list(client.completions.create(**more, prompt="Once", max_tokens=12, stream=True))
    try:
        client.chat.completions.create(**{**chat, "model": "other"})
    except openai.NotFoundError as error:
        refused = [error.status_code, error.code, error.param]
    print(
        json.dumps(
            {
                "models": [one.id for one in client.models.list()],
                "chat": whole.choices[0].message.content,
                "streamed chat": "".join(one.choices[0].delta.content or "" for one in chunks if one.choices),
                "role": chunks[0].choices[0].delta.role,
                "reasons": [whole.choices[0].finish_reason, chunks[-2].choices[0].finish_reason],
                "usage": [whole.usage.total_tokens, chunks[-1].usage.total_tokens],
                "completion": completion.choices[0].text,
                "streamed completion": "".join(one.choices[0].text for one in pieces),
                "refused": refused,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
