"""Text to tokens and back: every byte comes once, stop strings never, and a conversation as the template says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve.errors import CheckpointError
from serve.text import ChatError, Decoder, Text
from serve.tiny import BEGIN, END, SPECIAL, byte_tokenizer

TOKENIZER = byte_tokenizer()


def decoded(ids: list[int], stops: list[str]) -> tuple[str, bool]:
    """The text, put together from its pieces, and whether a stop string ended it."""
    decoder = Decoder(TOKENIZER, [BEGIN], stops)
    found = ""
    for token in ids:
        found += decoder.put(token)
        if decoder.is_stopped:
            break
    return found + decoder.end(), decoder.is_stopped


@given(
    st.text(alphabet="abé\u4e2d\U0001f600 ", max_size=30),
    st.lists(st.text(alphabet="ab\u00e9 ", max_size=4), max_size=4),
)
def test_the_pieces_are_the_text_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    found, is_stopped = decoded(ids, stops)
    assert is_stopped == bool(ends)
    # Of several stop strings the one that is whole first ends the text, which may begin later than another.
    assert found == text if not ends else text.startswith(found) and min(ends) <= len(found)
    if len(ends) == 1:
        assert found == text[: ends[0]]


def test_a_character_that_is_not_whole_at_the_end_is_marked() -> None:
    ids = TOKENIZER.encode("a\u4e2d", add_special_tokens=False).ids
    assert decoded(ids[:-1], []) == ("a\ufffd", False)
    assert decoded([*ids, END], []) == ("a\u4e2d", False)


def test_a_prompt_begins_with_the_first_token_and_a_chat_as_its_template_says(text: Text) -> None:
    assert text.encode("ab") == [BEGIN, *TOKENIZER.encode("ab", add_special_tokens=False).ids]
    found = text.encode_chat([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    written = f"{SPECIAL[0]}<|system|>S<|end|><|user|>U<|end|><|assistant|>"
    assert found == TOKENIZER.encode(written, add_special_tokens=False).ids
    assert found.count(BEGIN) == 1
    assert text.ends == {END}


def test_a_template_refuses_messages_and_reaches_nothing_of_python(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    template = folder / "chat_template.jinja"  # comes before the one of tokenizer_config.json
    template.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatError, match="the model's chat template refuses the messages: roles must alternate"):
        Text(folder).encode_chat([{"role": "user", "content": "a"}])
    template.write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ChatError, match="unsafe"):
        Text(folder).encode_chat([{"role": "user", "content": "a"}])
    template.write_text("{{ strftime_now('%Y')[:2] }}{{ messages | tojson }}")
    ids = Text(folder).encode_chat([{"role": "user", "content": "<é>"}])
    assert TOKENIZER.decode(ids) == '20[{"role": "user", "content": "<é>"}]'
    template.write_text("{% if %}")
    with pytest.raises(
        CheckpointError, match=r"chat_template.jinja: chat_template: found .*; must be a Jinja template"
    ):
        Text(folder)
