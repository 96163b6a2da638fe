"""The adapters beside the packages that they stand in for, each in its own environment (tests/adapters/environments.py).

What is compared, by the scripts in tests/adapters/peers: signatures; outputs and caches with the package's own reference
function, on random batches of every program; a layer's call through the package's own attention interface, under jit
and shard_map, with the adapter in the kernel's place; and with `install` the package's own models and layers, on caches
that the package makes.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import environments
import pytest
import yaml
from command import TINY, rpac

from rpac.devices import toolchain

SEED = random.SystemRandom().randrange(2**32)
PEERS = Path(__file__).parent / "peers"


# The bundles that are installed: what each has beside specs/tiny.yaml, whose serving it has too.
LATENT = {"attention": "latent", "q_heads": 16, "kv_lora_rank": 128, "rope_dim": 64, "q_dtype": "bfloat16"}
SERVED = {
    "with-lse": {"serving": {"log_sum_exp": True}},
    "wide-interleaved": {"serving": {"kv_layout": "interleaved"}},
    "wide-separate": {"serving": {"kv_layout": "separate"}},
    "wide-8-bits": {
        "model": {"kv_dtype": "float8_e4m3fn", "kv_scale": "tensor"},
        "serving": {"kv_layout": "separate", "page_size": 32},
    },
    "narrow-interleaved": {"model": {"head_dim": 64, "sinks": True}},
    "narrow-separate": {"model": {"head_dim": 64, "sinks": True}, "serving": {"kv_layout": "separate"}},
    "latent": {"latent": {**LATENT, "kv_dtype": "bfloat16", "sm_scale": 0.07}, "serving": {"page_size": 32}},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of one of SERVED for the CPU, built when it is first asked for."""
    folder = tmp_path_factory.mktemp("served")
    return functools.cache(lambda name: build(name, folder, "cpu"))


def build(name: str, folder: Path, target: str, **serving: object) -> Path:
    """One of SERVED for one target."""
    spec, changes = yaml.safe_load(TINY.read_text()), SERVED[name]
    model = changes.get("latent") or {**spec["model"], **changes.get("model", {})}
    serving = {**spec["serving"], **changes.get("serving", {}), **serving}
    made = {"name": name, "model": model, "serving": serving, "targets": [target]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(made))
    done = rpac("build", folder / f"{name}.yaml", "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / f"{name}.rpac"


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    done = rpac("build", TINY, "--target", "cpu", "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "tiny.rpac"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "in_server"),
    [
        ("tpu_inference", "attention interface in jit, device 1 of 2"),
        ("sglang_jax", "attention backend in jit"),
        ("ejkernel", "its operation in jit"),
    ],
)
def test_the_adapter_does_what_the_package_does(name: str, in_server: str, tiny_bundle: Path, tmp_path: Path) -> None:
    claims = run_in(name, tmp_path, f"check_{name}.py", tiny_bundle, SEED)
    assert sum(claim.startswith(in_server) and claim.endswith("caches equal") for claim in claims) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bundle", "whats"),
    [
        ("wide-interleaved", ("Llama on 2 devices", "Attention")),
        ("wide-separate", ("Llama on 2 devices", "Attention")),
        ("wide-8-bits", ("Llama on 2 devices",)),
        ("narrow-interleaved", ("GptOssAttention",)),
        ("narrow-separate", ("GptOssAttention",)),
        ("latent", ("mla_attention",)),
    ],
)
def test_tpu_inference_serves_an_installed_bundle(
    bundle: str, whats: tuple[str, ...], served: Callable[[str], Path], tmp_path: Path
) -> None:
    claims = run_in("tpu_inference", tmp_path, "serve_tpu_inference.py", SEED, served(bundle))
    for what in whats:
        assert f"{what}, bundle {bundle}: engine.traced was called" in claims


@pytest.mark.slow
def test_the_adapter_does_what_tokamax_does(served: Callable[[str], Path], tmp_path: Path) -> None:
    claims = run_in("tokamax", tmp_path, "check_tokamax.py", served("with-lse"), SEED)
    assert sum(claim.startswith("in jit") and "lse within" in claim for claim in claims) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bundle", "devices"), [("wide-separate", (1, 4)), ("narrow-separate", (1, 4)), ("latent", (1,))]
)
def test_tpu_inferences_attention_compiles_for_a_tpu_with_an_installed_bundle(
    bundle: str, devices: tuple[int, ...], tmp_path: Path
) -> None:
    built = build(bundle, tmp_path, "v6e", token_buckets=[32], num_pages=4096)
    claims = run_in("tpu_inference", tmp_path, "compile_tpu_inference.py", "v6e:2x2", built, env=toolchain.ENVIRONMENT)
    for count in devices:
        assert any(claim.startswith(f"{bundle} on {count} devices, ") and "compiled" in claim for claim in claims)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["wide-interleaved", "wide-separate"])
def test_sglang_jax_serves_an_installed_bundle(bundle: str, served: Callable[[str], Path], tmp_path: Path) -> None:
    claims = run_in("sglang_jax", tmp_path, "serve_sglang_jax.py", SEED, served(bundle))
    for devices in (1, 2):
        assert f"Llama on {devices} devices, bundle {bundle}: engine.traced was called" in claims


def run_in(
    name: str, home: Path, script: str, *arguments: object, env: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """What a script of tests/adapters/peers claims, in the environment of one package."""
    try:
        python = environments.ensure(name)
    except SystemExit as reason:  # no interpreter of the version that the packages need
        pytest.skip(str(reason))
    print(f"seed {SEED}")
    # ejkernel keeps what it tuned in the home folder.
    env = {**os.environ, **env, "PYTHONPATH": str(environments.ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(home)}
    command = [python, PEERS / script, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
