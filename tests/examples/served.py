"""The spec and the bundle of a small checkpoint, with a cache so small that a load preempts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rpac.build import all_tasks
from rpac.bundle import write_bundle
from rpac.init.draft import make_draft
from rpac.init.servers import SERVERS, Request
from rpac.spec import Spec, parse_spec

NUM_PAGES = 24  # of which a sequence of full length takes 8
FLAGS = {
    "max_model_len": 128,
    "page_size": 16,
    "max_num_seqs": 16,
    "max_num_tokens": 64,
    "num_pages": NUM_PAGES,
}
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64}


def spec_of(folder: Path, devices: int = 1, dtype: str = "float32") -> Spec:
    """What `rpac init` writes for a checkpoint, with one token bucket, so that little is compiled."""
    draft = make_draft(folder, Request(SERVERS["vllm"], "v6e", devices, FLAGS, dtype), "rpac init")
    spec = parse_spec(draft.text, "spec.yaml")
    serving = dataclasses.replace(spec.serving, token_buckets=spec.serving.token_buckets[-1:], prefill_chunk=32)
    return dataclasses.replace(spec, serving=serving)


def write_small_bundle(path: Path, spec: Spec) -> None:
    """A bundle with portable programs for the CPU alone."""
    from rpac.lower.worker import lower

    tools = {"jax": "any", "libtpu_build": "none"}
    write_bundle(path, spec, [lower(task, tools) for task in all_tasks(spec, ["cpu"])])
