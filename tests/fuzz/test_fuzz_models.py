"""Configs of models and files of tuned tiles: each is used, or refused by an error that names the file and the place."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import yaml
from command import ROOT
from fuzzing import fuzz, mutate_text, mutate_tree

from rpac.errors import ModelError, PlanError
from rpac.init.draft import make_draft
from rpac.init.servers import SERVERS, Request
from rpac.plan import plan_spec
from rpac.plan.tuned import FOLDER, TunedTiles
from rpac.spec import load_spec

TARGET = "tpu7x"


def test_configs_of_models(tmp_path: Path) -> None:
    configs = [row["config"] for row in yaml.safe_load((ROOT / "tests" / "init" / "models.yaml").read_text())]
    request = Request(SERVERS["vllm"], TARGET, None, {}, "auto", "auto")

    def make(rng: random.Random) -> bytes:
        config = rng.choice(configs)
        if rng.random() < 0.2:
            return mutate_text(rng, json.dumps(config, indent=1).encode())
        return json.dumps(mutate_tree(rng, config)).encode("utf-8", "surrogatepass")

    def check(data: bytes) -> None:
        (tmp_path / "config.json").write_bytes(data)
        try:
            make_draft(tmp_path, request, "rpac init")
        except (ModelError, PlanError) as error:
            str(error).encode()
            assert error.exit_code == 2

    fuzz("configs", 40, make, check)


def test_tuned_tiles(tmp_path: Path) -> None:
    """Those of a user's folder, for a spec that has some in the package."""
    spec = load_spec(ROOT / "specs" / "llama3-8b-separate.yaml")
    sound = json.loads((FOLDER / f"{TARGET}.json").read_text())
    assert any("tuned" in plan.origin for plan in plan_spec(spec, TARGET, tuned=TunedTiles.of(TARGET)))
    path = tmp_path / f"{TARGET}.json"

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return mutate_text(rng, json.dumps(sound, indent=1).encode())
        tree = mutate_tree(rng, sound) if rng.random() < 0.3 else copy.deepcopy(sound)
        for entry in tree["entries"] if isinstance(tree, dict) and isinstance(tree.get("entries"), list) else ():
            part = rng.choice(["key", "tiles"])
            if isinstance(entry, dict) and part in entry:
                entry[part] = mutate_tree(rng, entry[part])
        return json.dumps(tree).encode("utf-8", "surrogatepass")

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            for plan in plan_spec(spec, TARGET, tuned=TunedTiles.of(TARGET, tmp_path)):
                assert plan.origin
        except PlanError as error:
            str(error).encode()

    fuzz("tuned", 100, make, check)
