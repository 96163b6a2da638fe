"""Text to tokens and back: a checkpoint's tokenizer, its chat template, and stop strings."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from serve.config import read_json
from serve.errors import CheckpointError

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
GENERATION, CONFIG = "generation_config.json", "config.json"
REPLACEMENT = "\ufffd"


class ChatError(Exception):
    """Messages that the model's chat template does not take, or a model without one."""


class Text:
    """What a checkpoint folder says of text.

    `ends` are the tokens that end an answer. The chat template comes from chat_template.jinja or tokenizer_config.json.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for files that are missing, broken, or for another vocabulary than the model's."""
        self._tokenizer = _tokenizer(folder)
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
        self._special = {
            name: value["content"] if isinstance(value, dict) else value
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (value := settings.get(name)) is not None
        }
        self._template = _template(folder, settings)
        self.ends = _ends(folder)

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that the tokenizer puts around a text, such as a first one."""
        return list(self._tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant's answer begins. Raises ChatError."""
        if self._template is None:
            raise ChatError(f"the model has no chat template ({TEMPLATE} or {SETTINGS}); use /v1/completions")
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except TemplateError as error:
            raise ChatError(f"the model's chat template refuses the messages: {error}") from error
        # The template has written the first token already.
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decoder(self, prompt: Sequence[int], stops: Sequence[str] = ()) -> Decoder:
        """What turns the tokens after a prompt into text, up to the first of some strings."""
        return Decoder(self._tokenizer, prompt, stops)


class Decoder:
    """The text of an answer as its tokens come. `is_stopped` is set once a stop string was found; the text ends before it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer
        # It knows the prompt, because some tokenizers leave out the space before the first word of a text.
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._stops = [stop for stop in stops if stop]
        self._held = ""  # could be the start of a stop string
        self._pending: list[int] = []  # tokens that gave no text yet

    def put(self, token: int) -> str:
        """The text that is certain with one more token: often none, because a character may need several."""
        found = self._stream.step(self._tokenizer, token)
        self._pending = [*self._pending, token] if found is None else []
        return self._without_stops(found or "")

    def end(self) -> str:
        """The rest of the text: what could have become a stop string, and a mark for a character that is not whole."""
        if self.is_stopped:
            return ""
        pending = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        return self._held + (REPLACEMENT if pending.endswith(REPLACEMENT) else "")

    def _without_stops(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    if not path.exists():
        raise CheckpointError(path, "", "no file", "must exist", "write it with `save_pretrained` of a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
        raise CheckpointError(path, "", str(error), "must be a tokenizer", "download the file again") from error
    vocabulary = read_json(folder / CONFIG).get("vocab_size")
    most = max(tokenizer.get_vocab().values(), default=-1)
    if not isinstance(vocabulary, int) or most >= vocabulary:
        raise CheckpointError(
            path,
            "",
            f"the token {most}",
            f"must be below vocab_size, {vocabulary}, by {CONFIG}",
            "use the tokenizer of this model",
        )
    return tokenizer


def _template(folder: Path, settings: Mapping[str, Any]) -> Any:
    """The compiled chat template, with the functions that transformers gives one; None if there is none."""
    source, place = settings.get("chat_template"), folder / SETTINGS
    if isinstance(source, list):  # several, by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if (folder / TEMPLATE).exists():
        place = folder / TEMPLATE
        source = place.read_text("utf-8")
    if source is None:
        return None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise CheckpointError(
            place, "chat_template", str(error), "must be a Jinja template", "download the file again"
        ) from error


def _ends(folder: Path) -> frozenset[int]:
    for name in (GENERATION, CONFIG):
        found = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if any(type(one) is not int for one in ids):
                raise CheckpointError(
                    folder / name, "eos_token_id", str(found), "must be token ids", "correct the file"
                )
            return frozenset(ids)
    return frozenset()
