"""The whole step of a checkpoint, for a bundle that holds it:

    MODEL=models/llama PYTHONPATH=examples rpac build spec.yaml --step serve.whole:step

`MODEL` is the checkpoint's folder, of which only config.json is read. `DTYPE` is bfloat16 or float32, by default the
checkpoint's own.
"""

from __future__ import annotations

import os
from pathlib import Path

from serve.config import DTYPES, read_config
from serve.errors import CheckpointError
from serve.model import make_step

if "MODEL" not in os.environ:
    raise CheckpointError("the environment", "MODEL", "no value", "must be the folder of a checkpoint", "set it")
dtype = os.environ.get("DTYPE")
if dtype not in (None, *DTYPES):
    raise CheckpointError("the environment", "DTYPE", dtype, f"must be one of {', '.join(DTYPES)}", "correct it")
step, step_arrays = make_step(read_config(Path(os.environ["MODEL"]), dtype))
