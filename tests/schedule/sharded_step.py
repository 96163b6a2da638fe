"""A step of three equal layers on two devices, small enough to keep its schedules.

Run as a script it compiles the step for TPU7x and writes the fixture beside it:

    python -m tests.schedule.sharded_step
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

LAYERS, WIDTH, HIDDEN, VOCABULARY, HEADS, HEAD_DIM = 3, 256, 1024, 512, 4, 128
FIXTURE = Path(__file__).parent / "fixtures" / "step-tpu7x.json.gz"
SPEC = f"""
name: sharded-step
model: {{q_heads: {HEADS}, kv_heads: 2, head_dim: {HEAD_DIM}, q_dtype: bfloat16, kv_dtype: bfloat16}}
serving:
  page_size: 16
  max_model_len: 64
  max_num_tokens: 16
  token_buckets: [16]
  max_num_seqs: 8
  prefill_chunk: 16
  context_lens: [64]
  num_pages: 32
parallel: {{tensor: 2}}
targets: [tpu7x]
"""


def step(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any) -> Any:
    x = params["embedding"][token_ids]
    after = []
    for layer, cache in zip(params["layers"], caches, strict=True):
        q, k, v = (x @ layer[name] for name in ("q", "k", "v"))
        out, cache, *_ = attend(*(one.reshape(len(x), -1, HEAD_DIM) for one in (q, k, v)), cache)
        x = x + out.reshape(len(x), -1) @ layer["o"]
        x = x + jax.nn.silu(x @ layer["up"]) @ layer["down"]
        after.append(cache)
    rows = jnp.maximum(batch.cu_q_lens[1:] - 1, 0)
    return jnp.argmax(x[rows] @ params["head"], axis=-1), after


def step_arrays(kind: str, tokens: int, limits: Any) -> Any:
    def weight(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    queries, keys = HEADS * HEAD_DIM, 2 * HEAD_DIM
    layer = {
        "q": weight(WIDTH, queries),
        "k": weight(WIDTH, keys),
        "v": weight(WIDTH, keys),
        "o": weight(queries, WIDTH),
        "up": weight(WIDTH, HIDDEN),
        "down": weight(HIDDEN, WIDTH),
    }
    cuts = {name: P("kv") if name in ("o", "down") else P(None, "kv") for name in layer}
    table = weight(VOCABULARY, WIDTH)
    return {
        "params": {"embedding": table, "layers": [layer] * LAYERS, "head": weight(WIDTH, VOCABULARY)},
        "caches": LAYERS,
        "shardings": {"params": {"embedding": P(), "layers": [cuts] * LAYERS, "head": P(None, "kv")}},
    }


def main() -> None:
    from rpac.files.store import Store
    from rpac.predict.steps import steps_to_predict

    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "spec.yaml")
        spec.write_text(SPEC)
        here = Path(__file__).parent
        steps = steps_to_predict(spec, "tpu7x", "sharded_step:step", here, Store(None), print)
        [found] = [steps.schedules(variant) for variant in steps.tasks if variant.kind == "decode"]
    # What makes it large and is not read: the kernels' own code, and how full the slots of an instruction are.
    hlo = re.sub(
        r'"body":"([^"]*)"',
        lambda body: f'"body":"{hashlib.sha256(body[1].encode()).hexdigest()}"',
        found.call.dump.hlo,
    )
    schedules = {
        "dump": asdict(replace(found.call.dump, hlo=hlo, utilizations={})),
        "arguments": found.arguments,
        "parameters": found.parameters,
        "cache_layers": found.cache_layers,
    }
    FIXTURE.write_bytes(gzip.compress(json.dumps(schedules, sort_keys=True).encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
