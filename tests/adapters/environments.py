"""The peers' own environments under build/: a jax that each asks for, its package from the index, and no server around it.

    python tests/adapters/environments.py tpu_inference sglang_jax tokamax ejkernel

makes them and prints their interpreters. Needs Python 3.12 or 3.13.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """`needs` are installed with their dependencies; `peer` without, because a server's are heavy."""

    peer: str
    needs: tuple[str, ...]


# flatbuffers is what rpac needs to read a bundle beside jax; the rest is what the peers' kernels import.
ENVIRONMENTS = {
    # 0.32.0 asks for this jax, libtpu and flax; transformers has the configurations of its models.
    "tpu_inference": Environment(
        "tpu-inference==0.32.0",
        ("jax==0.11.2", "libtpu==0.0.48", "flatbuffers", "flax==0.12.10", "jaxtyping", "transformers"),
    ),
    # 0.0.2 asks for jax 0.8, older than rpac takes; the repository's main branch asks for 0.11.1.
    "sglang_jax": Environment("sglang-jax==0.0.2", ("jax==0.11.1", "flatbuffers", "flax")),
    # 0.0.17 asks for jax 0.11.1 or later.
    "tokamax": Environment(
        "tokamax==0.0.17",
        ("jax==0.11.2", "flatbuffers", "absl-py", "einshape", "immutabledict", "jaxtyping", "pydantic", "qwix", "tqdm"),
    ),
    # 0.0.80.3 asks for jax 0.10.
    "ejkernel": Environment(
        "ejkernel==0.0.80.3",
        ("jax==0.10.2", "flatbuffers", "beartype", "chex", "einops", "jaxtyping", "pydantic", "tqdm"),
    ),
}


def ensure(name: str) -> Path:
    """The interpreter of the environment of one adapter's peer, made where it is not there."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from peers import environment  # the comparison makes its own likewise
    finally:
        sys.path.pop(0)
    wanted = ENVIRONMENTS[name]
    return Path(environment.ensure(ROOT / "build" / "adapters" / name, wanted.needs, [wanted.peer]))


if __name__ == "__main__":
    for asked in sys.argv[1:] or ENVIRONMENTS:
        print(ensure(asked), flush=True)
