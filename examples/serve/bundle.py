"""Opens a bundle for a checkpoint: checks that they fit, loads the weights, and chooses how the steps run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import jax

import rpac
from rpac.bundle import Manifest, read_manifest
from rpac.contract.attention import Attention
from rpac.devices.placement import Placement
from serve.checkpoint import load_params
from serve.config import Config, read_config
from serve.errors import CheckpointError
from serve.steps import JitSteps, Steps, WholeSteps
from serve.weights import Weight

TAKEN = ("queries", "keys", "values", "kv_cache", "kv_lens", "page_indices", "cu_q_lens", "distribution")


def open_bundle(path: str, folder: Path, target: str | None = None) -> Steps:
    """The steps of a checkpoint folder: those that the bundle holds, else compiled here around its programs of attention.

    Raises CheckpointError if the two do not fit, and what `rpac.load` raises.
    """
    manifest = read_manifest(path)
    config = config_for(path, manifest, folder)
    if manifest.steps:
        whole = rpac.load_steps(path, target)
        return WholeSteps(whole, config, load_params(folder, config, sharding_on(whole.placement)))
    engines = rpac.load_layers(path, target)
    placement = next(iter(engines.values())).placement
    return JitSteps(engines, config, load_params(folder, config, sharding_on(placement)))


def config_for(path: str, manifest: Manifest, folder: Path) -> Config:
    """The model of a checkpoint folder, in the dtype of a bundle. Raises CheckpointError if the bundle is for another."""
    config = read_config(folder, manifest.model.q_dtype)
    longest = manifest.limits.max_kv_len
    config = replace(config, windows=tuple(_effective(window, longest) for window in config.windows))
    kinds = dict(zip(config.kinds, config.windows, strict=True))
    targets = {target.layer: target for target in manifest.targets.values()}
    if set(kinds) != set(targets):
        raise _misfit(path, "layers", _shown(targets), _shown(kinds))
    for kind, window in kinds.items():
        target = targets[kind]
        model = target.model or manifest.model
        taken = tuple(dims.name for dims in target.programs[0].args)
        _check(path, manifest, config, model, taken, window)
    return config


def sharding_on(placement: Placement) -> Callable[[Weight], jax.sharding.Sharding]:
    """Where each weight lies, for `load_params`: on the one device, or cut over the mesh."""

    def place(weight: Weight) -> jax.sharding.Sharding:
        return placement.cut([(axes,) if isinstance(axes, str) else axes or () for axes in weight.cut])

    return place


def _check(
    path: str, manifest: Manifest, config: Config, model: Attention, taken: tuple[str, ...], window: int | None
) -> None:
    """Refuses a bundle whose attention is not that of these layers. The heads of a bundle are those of one device."""
    mesh = manifest.mesh
    facts = (  # a key of the spec, what the bundle has, and what the checkpoint needs
        ("arguments", taken, TAKEN),
        ("parallel.data", mesh.data, 1),
        ("model.q_heads", model.q_heads * mesh.query_parts, config.q_heads),
        ("model.kv_heads", model.kv_heads * mesh.kv, config.kv_heads),
        ("model.head_dim", model.head_dim, config.kernel_head_dim),
        ("model.sm_scale", round(model.sm_scale, 6), round(config.head_dim**-0.5, 6)),
        ("model.sliding_window", _effective(model.sliding_window, manifest.limits.max_kv_len), window),
        ("model.soft_cap", model.soft_cap, None),
        ("serving.decode_len", manifest.limits.decode_len, 1),
    )
    for key, found, wanted in facts:
        if found != wanted:
            raise _misfit(path, key, str(found), str(wanted))


def _effective(window: int | None, longest: int) -> int | None:
    """A window, or None for one that hides nothing of the longest sequence: `rpac init` leaves it out of the spec."""
    return None if window is None or window >= longest else window


def _misfit(path: str, key: str, found: str, wanted: str) -> CheckpointError:
    fix = "make the spec of this checkpoint with `rpac init`, and build it"
    return CheckpointError(path, key, found, f"must be {wanted}, by config.json", fix)


def _shown(kinds: Collection[str]) -> str:
    return ", ".join(kind or "one kind" for kind in kinds)
