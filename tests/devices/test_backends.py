"""On a machine without TPU nobody looks for one, unless the user says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CODE = """
import json, sys
import jax
from rpac.devices import backends
exec(sys.argv[2])
import rpac
engine = rpac.load(sys.argv[1])
from jax._src import xla_bridge
print(json.dumps([engine.target, "tpu" in xla_bridge._backend_factories]))
"""
CHIP = "backends.hardware_utils.num_available_tpu_chips_and_device_id = lambda: (4, None)"


def loaded(bundle: Path, before: str = "", **env: str) -> tuple[Any, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    command = [sys.executable, "-c", CODE, str(bundle), before]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, **env}, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_load_without_a_tpu_is_quiet_and_does_not_look_for_one(bundle: Path) -> None:
    assert loaded(bundle) == (["cpu", False], "")


@pytest.mark.parametrize(
    ("before", "env"),
    [
        (CHIP, {}),
        ("", {"JAX_PLATFORMS": "cpu"}),
        ("jax.config.update('jax_platforms', 'cpu')", {}),
        ("backends._DEVICE_FILES = ('/dev/null',)", {}),
    ],
    ids=["chip", "environment", "config", "device file"],
)
def test_a_tpu_or_the_users_own_choice_is_left_alone(bundle: Path, before: str, env: dict[str, str]) -> None:
    (target, looked_for), _ = loaded(bundle, before, **env)
    assert (target, looked_for) == ("cpu", True)
