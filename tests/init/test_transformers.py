"""Every decoder of the transformers package at its defaults gives a spec that plans, or a refusal that names its key.

The package is in an environment of its own, under build/init. `make test-init` runs this.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import ROOT

from rpac.errors import ModelError
from rpac.init.draft import Draft, make_draft
from rpac.init.servers import SERVERS, Request
from rpac.plan import plan_spec
from rpac.plan.tuned import TunedTiles
from rpac.spec import parse_spec

PACKAGE = "transformers==5.24.0"
CHIP = "tpu7x"
DEVICES = (1, 8, 32)  # until the weights fit
LEAST_DRAFTS = 250
# The key that each refusal names, by model type.
REFUSED: dict[str, str] = yaml.safe_load(Path(__file__).with_name("refused.yaml").read_text())


def interpreter() -> str:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from peers import environment
    finally:
        sys.path.pop(0)
    try:
        return environment.ensure(ROOT / "build" / "init", [PACKAGE], [PACKAGE])
    except SystemExit as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    script = Path(__file__).with_name("dump_configs.py")
    done = subprocess.run([interpreter(), script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def draft(path: Path) -> Draft | ModelError:
    """The draft on the fewest devices that hold the weights, or the refusal."""
    error: ModelError | None = None
    for devices in DEVICES:
        try:
            return make_draft(path, Request(SERVERS["vllm"], CHIP, devices, {}), "rpac init")
        except ModelError as refusal:
            error = refusal
            if not refusal.problems[0].where.startswith("HBM"):
                break
    assert error is not None
    return error


@pytest.mark.slow
def test_every_decoder_plans_or_is_refused_by_its_key(configs: dict[str, Any], tmp_path: Path) -> None:
    refused, planned, without = {}, [], []
    for model_type, config in configs.items():
        if isinstance(config, str):
            without.append(f"{model_type}: {config}")
            continue
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        made = draft(path)
        if isinstance(made, ModelError):
            [problem] = made.problems
            assert problem.file == str(path)
            refused[model_type] = problem.where
            print(f"{model_type}: {problem.where}: found {problem.found}; {problem.allowed}")
            continue
        for part in parse_spec(made.text, "spec.yaml").parts:
            assert plan_spec(part, CHIP, tuned=TunedTiles())
        planned.append(model_type)
    print(f"{PACKAGE}: {len(planned)} plan, {len(refused)} are refused, {len(without)} have no defaults: {without}")
    assert refused == REFUSED
    assert len(planned) >= LEAST_DRAFTS
