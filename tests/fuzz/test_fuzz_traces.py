"""Traces and files of results: each is read or refused by an error that names the line, and what is read can be used."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from fuzzing import deep, fuzz, mutate_text, mutate_tree

from rpac.batch import Limits
from rpac.bundle import read_manifest
from rpac.contract.program import Variant
from rpac.errors import BatchError, TrustError
from rpac.spec import Spec
from rpac.traffic.buckets import Traffic
from rpac.traffic.explain import explain
from rpac.traffic.trace import read_trace
from rpac.trust import evidence

TRACE = b"""{"q_lens": [1, 1, 1], "kv_lens": [5, 17, 128]}

{"q_lens": [16, 1], "kv_lens": [16, 20], "label": "x"}
{"q_lens": [5], "kv_lens": [5]}
"""
LIMITS = Limits(page_size=16, pages_per_seq=8, max_num_seqs=4, num_pages=32, prefill_chunk=16, token_buckets=(8, 32))
BUILT = {Variant("decode", 8), Variant("mixed", 32)}


def test_traces(tmp_path: Path, tiny: Spec) -> None:
    path = tmp_path / "trace.jsonl"

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate_text(rng, TRACE)
        rows = [json.loads(line) for line in TRACE.splitlines() if line]
        return "\n".join(json.dumps(mutate_tree(rng, row)) for row in rows).encode("utf-8", "surrogatepass")

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            workloads = read_trace(path)
            for one in workloads:
                json.dumps(explain(BUILT, LIMITS, one).as_dict())
                assert one.context >= 1
            Traffic.of(workloads, tiny)
        except BatchError as error:
            assert "trace.jsonl" in str(error)

    fuzz("traces", 400, make, check)


@pytest.mark.parametrize("kind", ["tests", "predictions", "bench"])
def test_results(kind: str, bundle: Path, tmp_path: Path) -> None:
    """What `rpac sign` is given as results of a check, of predictions and of a bench."""
    manifest = read_manifest(bundle)
    path = tmp_path / "results.json"
    sound = results(kind, manifest)
    read = getattr(evidence, kind)
    path.write_text(json.dumps(sound))
    read(path, manifest)

    def make(rng: random.Random) -> bytes:
        tree = {"kind": kind, "data": deep(900) if rng.random() < 0.01 else mutate_tree(rng, sound)}
        return json.dumps(tree).encode("utf-8", "surrogatepass")

    def check(data: bytes) -> None:
        tree = json.loads(data)
        if tree["kind"] != kind:
            return
        path.write_text(json.dumps(tree["data"]), encoding="utf-8", errors="surrogatepass")
        try:
            json.dumps(read(path, manifest), allow_nan=False)
        except TrustError as error:
            assert "results.json" in str(error)

    fuzz("results", 200, make, check)


def results(kind: str, manifest: Any) -> dict[str, Any]:
    """A file that is right for a bundle."""
    from rpac.bundle import digest

    sources = {name.removeprefix("source/"): one.sha256 for name, one in manifest.files.items() if name != "spec.yaml"}
    first, *_ = sources
    row = {"source": first, "mode": "compiled", "batch": "empty", "error": 0.001, "tolerance": 0.01}
    if kind == "tests":
        rows = [{**row, "cache_ok": True, "races": [], "notes": []}]
        compiled = [{"target": "cpu", "programs": 5, "message": ""}]
        return {
            "spec_hash": manifest.spec_hash, "sources": sources, "results": rows, "compiled": compiled, "ok": True, "seed": 7,
        }  # fmt: skip
    if kind == "predictions":
        libtpu = manifest.targets["cpu"].toolchain.get("libtpu")
        one = {
            "target": "cpu", "program": "decode/8", "batch": {"label": "x"}, "compiler": libtpu,
            "compiler_verified": True, "seconds": 1e-5, "kernel_seconds": 1e-5, "mbu": 0.5, "mfu": 0.1,
            "source": {"path": first, "sha256": sources[first]}, "schedules": {"decode": "0" * 64}, "model": {"clock": 1.0},
        }  # fmt: skip
        return {"predictions": [one]}
    entry = {"kind": "decode", "tokens": 8, "label": "x", "timing": {"spread": {"median": 1e-5}}}
    return {
        "format": "rpac bench", "bundle": {"digest": digest(manifest), "target": "cpu"}, "complete": True, "cases": 1,
        "entries": [entry],
    }  # fmt: skip
