"""An entry of the cache that was changed is dropped and made anew, whatever is in its place."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

from fuzzing import fuzz, mutate_text, mutate_tree

from rpac.contract.program import Lowered, Source
from rpac.files.store import DIGESTS
from rpac.lower.cache import FACTS, Cache
from rpac.lower.task import Task

TOOLS = {"jax": "0.10.2"}
TASK = Task("cpu", "decode", 8, Source("cpu/decode.py", "pass\n"), {"tile": [8, 128]}, ())
LOWERED = Lowered(
    "cpu", "decode", 8, TASK.source, TASK.plan, b"exported", b"executable", device_kind="cpu", topology=None, toolchain=TOOLS,
    flags={"a": "b"}, aliases={"kv_cache": 1}, memory={"temp_bytes": 10},
)  # fmt: skip


def test_cache_entries(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.put(TASK, TOOLS, LOWERED)
    key = TASK.key(TOOLS)
    folder = tmp_path / "cache" / key[:2] / key
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert cache.get(TASK, TOOLS) == LOWERED

    def make(rng: random.Random) -> bytes:
        files = {name: data.decode() for name, data in sound.items()}
        name = rng.choice(sorted(files))
        how = rng.choice(["bytes", "tree", "gone", "folder", "link", "deep"])
        changed = files[name]
        if how == "bytes":
            changed = mutate_text(rng, sound[name]).decode("utf-8", "replace")
        elif how == "tree" and name in (FACTS, DIGESTS):
            changed = json.dumps(mutate_tree(rng, json.loads(changed)))
        elif how == "deep":
            changed = "[" * 100_000
        return json.dumps({"name": name, "how": how, "text": changed, "sealed": rng.random() < 0.7}).encode()

    def check(data: bytes) -> None:
        case = json.loads(data)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        (tmp_path / "cache").chmod(0o700)
        files: dict[str, Any] = {**sound, case["name"]: case["text"].encode("utf-8", "surrogatepass")}
        if case["sealed"] and case["name"] != DIGESTS:  # the forger gives it the hash that it has now
            hashes = {name: hashlib.sha256(text).hexdigest() for name, text in files.items() if name != DIGESTS}
            files[DIGESTS] = json.dumps({"key": key, "files": hashes}).encode()
        for name, text in files.items():
            path = folder / name
            if name == case["name"] and case["how"] == "gone":
                continue
            if name == case["name"] and case["how"] == "folder":
                path.mkdir()
            elif name == case["name"] and case["how"] == "link":
                path.symlink_to(folder / "nowhere")
            else:
                path.write_bytes(text)
        found = cache.get(TASK, TOOLS)
        if found is None:
            assert not folder.exists(), "a bad entry keeps a good one from its place"
            cache.put(TASK, TOOLS, LOWERED)
            assert cache.get(TASK, TOOLS) == LOWERED
        else:
            assert isinstance(found.exported, bytes)
            assert all(isinstance(one, dict) for one in (found.toolchain, found.flags, found.aliases, found.memory))

    fuzz("cache", 300, make, check)
