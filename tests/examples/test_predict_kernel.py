"""The example of a kernel that is not rpac's: more tiles are partly filled where groups are ragged, so it takes longer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.compile
def test_the_example_predicts_both_batches() -> None:
    command = [sys.executable, "examples/predict_kernel.py", "tpu7x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = [float(found) for found in re.findall(r"  gmm\.\d+: ([\d.]+) us", done.stdout)]
    balanced, ragged = kernels
    assert ragged > balanced > 0
    for part in ("MBU 0.", "MFU 0.", "cycles at", "stalls", "iterations", "MXU 0."):
        assert done.stdout.count(part) >= 2
