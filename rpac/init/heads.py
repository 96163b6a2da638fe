"""Heads and their length: what all kinds of attention read alike."""

from __future__ import annotations

from rpac.init.config import Config, Found, refuse
from rpac.init.names import HEAD_DIM, KV_HEADS, Q_HEADS, WIDTH


def read_q_heads(config: Config) -> Found:
    """The query heads of all devices. Raises ModelError where there are none."""
    found = config.integer(*Q_HEADS, high=1024)
    if found is None:
        fix = "check that it is the config.json of a model that writes text, or write the spec by hand"
        refuse(
            config.file,
            config.where("num_attention_heads"),
            "no such key",
            f"must be given, as {_either(Q_HEADS)}",
            fix,
        )
    return found


def read_kv_heads(config: Config, q_heads: Found) -> Found:
    """The KV heads: one, those that a key gives, or as many as query heads."""
    multi_query = config.flag("multi_query")
    new = config.flag("new_decoder_architecture")  # Falcon: then multi_query does not count
    if multi_query is not None and multi_query.value and not (new is not None and new.value):
        return multi_query.made(1)
    attn_type = config.get("attn_config.attn_type")
    if attn_type is not None and attn_type.value == "multiquery_attention":
        return attn_type.made(1)
    found = config.integer(*KV_HEADS, high=1024)
    if found is None:
        why = f"as many as query heads, because no key gives fewer ({_either(KV_HEADS[1:3])}, ...)"
        return q_heads.made(q_heads.value, why)
    if q_heads.value % found.value:
        allowed = f"must divide the {q_heads.value} query heads ({q_heads.why})"
        config.refuse(KV_HEADS, allowed, "correct the file, or write the spec by hand")
    return found


def read_head_dim(config: Config, q_heads: int) -> Found:
    """The length of a head: a key, or the model's width over its heads."""
    found = config.integer(*HEAD_DIM)
    if found is not None:
        return found
    width = config.integer(*WIDTH)
    if width is None:
        fix = "check that it is a whole config.json, or write the spec by hand"
        refuse(
            config.file, config.where("head_dim"), "no such key", f"must be given, or one of {', '.join(WIDTH)}", fix
        )
    if width.value % q_heads:
        allowed = f"must be a multiple of the {q_heads} query heads where no head_dim is given"
        config.refuse(WIDTH, allowed, "correct the file, or write the spec by hand")
    return width.made(width.value // q_heads, f"{width.why} / {q_heads} heads")


def padded(config: Config, found: Found, lengths: tuple[int, ...], what: str) -> Found:
    """The shortest length of a kernel that holds one of the model; `found` itself where it is one."""
    if found.value in lengths:
        return found
    length = next((one for one in lengths if one >= found.value), None)
    if length is None:
        allowed = f"must be at most {lengths[-1]}, the longest {what} that rpac has kernels for"
        refuse(config.file, found.key, str(found.value), allowed, "serve this model without rpac")
    return found.made(length, f"{found.why}, padded to a length that rpac has")


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
