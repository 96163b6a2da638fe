"""What the oracle says of calls: the stored answers of a bundle's canaries, and those of any other call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rpac.batch import Limits
from rpac.contract import arrays as layout
from rpac.contract.attention import Attention
from rpac.contract.kind import Kind
from rpac.files.store import Store
from rpac.oracle import attention as reference
from rpac.oracle import canary
from rpac.oracle import latent as reference_latent
from rpac.oracle.canary import Array, ProbeCall
from rpac.spec import Spec

_ENTRY = "answer"


def oracle_options(model: Attention, kv_layout: str) -> dict[str, Any]:
    """What the oracle must know of a spec or a bundle beside a call's arguments."""
    names = ("sm_scale", "soft_cap", "sliding_window", "attention_chunk", "causal")
    return {"kv_layout": kv_layout, **{name: getattr(model, name) for name in names}}


def oracle(
    model: Attention, kv_layout: str, args: Sequence[Array], extra: Mapping[str, Any]
) -> tuple[NDArray[np.float32], Array, NDArray[np.float32] | None]:
    """What a program of this model makes of its arguments, those of the batch in order and `extra` by name.

    The third result is the logarithm of each softmax's denominator, None of latent attention.
    """
    if model.rope_dim is not None:
        return *reference_latent.latent_paged_attention(*args, sm_scale=model.sm_scale), None
    options = {**oracle_options(model, kv_layout), **extra}
    if not model.update_cache:
        queries, *others = args
        return reference.attention_with_lse(queries, None, None, *others, kv_heads=model.kv_heads, **options)
    return reference.attention_with_lse(*args, **options)


def expected(
    call: ProbeCall, model: Attention, kv_layout: str, log_sum_exp: bool = False
) -> tuple[NDArray[np.float32], Array, NDArray[np.float32] | None]:
    """The oracle's output of a call, what the call's pages hold afterwards, and the lse of programs that return it."""
    batch = call.batch
    places = np.zeros(batch.limits.num_pages, np.int32)
    places[call.pages] = np.arange(len(call.pages))
    # A cache of these pages alone, because one of all of them may take gigabytes.
    tables = places[batch.page_indices]
    args = (*call.by_token.values(), call.held, batch.kv_lens, tables, batch.cu_q_lens, batch.distribution)
    out, pages, lse = oracle(model, kv_layout, args, call.extra)
    return out, pages, lse if log_sum_exp else None


def canary_answers(spec: Spec, variants: Iterable[tuple[str, int]], store: Store) -> dict[tuple[str, str, int], bytes]:
    """The stored answer of each (kind, tokens), by (layer, kind, tokens); those made before come from `store`."""
    return {
        (spec.layer, kind, tokens): _answer(spec, cast(Kind, kind), tokens, store) for kind, tokens in set(variants)
    }


def _answer(spec: Spec, kind: Kind, tokens: int, store: Store) -> bytes:
    key = _key(spec, kind, tokens)
    known = store.read(key)
    if known is not None and _ENTRY in known:
        return known[_ENTRY]
    kv_layout = spec.serving.kv_layout
    call = canary.canary(kind, layout.arg_specs(spec, tokens), Limits.of(spec), kv_layout)
    made = canary.answer(call, *expected(call, spec.model, kv_layout, spec.serving.log_sum_exp))
    store.write(key, {_ENTRY: made})
    return made


def _key(spec: Spec, kind: Kind, tokens: int) -> str:
    """sha256 over all that decides an answer, the code that makes the inputs and the oracle included."""
    limits = Limits.of(spec)
    sources = [
        Path(str(module.__file__)).read_bytes()
        for module in (canary, reference, *((reference_latent,) if spec.model.rope_dim else ()))
    ]
    what = {
        "result": "canary",
        "kind": kind,
        "rows": canary.canary_rows(kind, tokens, limits),
        "model": asdict(spec.model),
        "limits": limits.as_dict(),
        "kv_layout": spec.serving.kv_layout,
        **{key: True for key in ("tree_mask", "log_sum_exp") if getattr(spec.serving, key)},
        "sources": [hashlib.sha256(source).hexdigest() for source in sources],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
