"""Opens a bundle for a device: finds the target that was built for it, and whether its executables run here."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from rpac.bundle import Manifest, Target, digest, read_manifest, read_steps, read_target
from rpac.devices.backends import skip_absent_tpu
from rpac.devices.chip import PLATFORMS
from rpac.devices.client import build_string
from rpac.devices.process import own_runtime
from rpac.engine.engine import Engine
from rpac.engine.events import Observer
from rpac.engine.steps import StepEngine
from rpac.errors import BundleError, TargetError

if TYPE_CHECKING:
    from rpac.bundle.read import Approve
    from rpac.trust import Policy

_LOG = logging.getLogger("rpac")


def load(
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    device: jax.Device | None = None,
    devices: Sequence[jax.Device] | None = None,
    layer: str = "",
    allow_compile: bool = False,
    observer: Observer | None = None,
    timeout_s: float | None = None,
    expect_digest: str | None = None,
    trust: str | os.PathLike[str] | Policy | None = None,
    watchdog_s: float | None = None,
) -> Engine:
    """The engine of a bundle for one device, by default this process's first (`target="cpu"`: its CPU); or for as many
    `devices` as its spec's `parallel` says, in the order of its mesh, by default this process's first ones.

    `path` is the bundle's folder, a URL that fsspec opens, or `package:NAME` where a wheel of `rpac pack` is installed.
    `target` is by default the one built for exactly this kind of device; `layer` names the kind of layers, of a model that
    has several. Reads and hashes the bytes of all its programs; none is deserialized before its hash, the device kind and the
    libtpu build match. `allow_compile=True` lets a target whose executables do not fit this process compile its portable
    programs instead, and logs that. `observer` is called with every event of the engine. `timeout_s`: seconds that reading
    the bundle may take, of a store that may be slow; by default as long as it takes. `expect_digest`: the digest that `rpac
    inspect` shows of the bundle that you mean; it covers every file, and another bundle is refused before anything of it is
    used. `trust`: the file of a trust policy, or what `rpac.trust.load_policy` made of one; nothing of the bundle is deserialized
    before its attestations hold what the policy asks. `watchdog_s`: seconds after which a call that has not returned is told to
    the observer and the log, and named by `engine.overdue`; by default nobody watches.
    Raises BundleError; TrustError for a policy that cannot be used; or TargetError naming what the bundle has and what was found.
    """
    found = _found(target, device, devices, trust, expect_digest)
    choose = partial(_choose, os.fspath(path), target, layer, found[0], expect_digest)
    loaded = read_target(path, choose, timeout_s, _approve(trust))
    chosen = _for_mesh(os.fspath(path), loaded.manifest, found, device is not None or devices is not None)
    without = [str(program.variant) for program in loaded.target.programs if program.executable is None]
    use_executables = _use_executables(os.fspath(path), loaded.target, without, chosen[0], allow_compile)
    return Engine(loaded, chosen, use_executables, observer, watchdog_s)


def load_steps(
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    device: jax.Device | None = None,
    devices: Sequence[jax.Device] | None = None,
    allow_compile: bool = False,
    observer: Observer | None = None,
    timeout_s: float | None = None,
    expect_digest: str | None = None,
    trust: str | os.PathLike[str] | Policy | None = None,
    watchdog_s: float | None = None,
) -> StepEngine:
    """The whole steps of a bundle that was built with a step, for all kinds of its layers; the arguments are those of `load`,
    and what it raises. Raises BundleError where the bundle has no steps for the target.
    """
    found = _found(target, device, devices, trust, expect_digest)
    choose = partial(_choose, os.fspath(path), target, None, found[0], expect_digest)
    loaded = read_steps(path, choose, timeout_s, _approve(trust))
    chosen = _for_mesh(os.fspath(path), loaded.manifest, found, device is not None or devices is not None)
    without = [f"step {program.variant}" for program in loaded.steps.programs if program.executable is None]
    use_executables = _use_executables(os.fspath(path), loaded.target, without, chosen[0], allow_compile)
    return StepEngine(loaded, chosen, use_executables, observer, watchdog_s)


def _found(
    target: str | None,
    device: jax.Device | None,
    devices: Sequence[jax.Device] | None,
    trust: object,
    expect_digest: str | None,
) -> list[jax.Device]:
    """The devices that the caller names, or those of this process."""
    own_runtime()
    if trust is None and expect_digest is None:
        _say_once_that_nothing_is_trusted()
    return _local_devices(target) if device is None and devices is None else _given_devices(device, devices)


def _for_mesh(path: str, manifest: Manifest, found: list[jax.Device], chosen: bool) -> list[jax.Device]:
    """The devices of a bundle's mesh among those found. Raises TargetError where they are too few, or too many `chosen`."""
    count = manifest.mesh.devices
    if len(found) < count or (chosen and len(found) > count):
        fix = "give as many"
        if not chosen and jax.process_count() > 1:
            found_all = len(jax.devices())
            fix = f"pass devices=jax.devices() in each of the {jax.process_count()} processes, which have {found_all} together"
        raise TargetError(
            f"{path}: found {len(found)} devices; the bundle's programs run on {count}; {fix}, or build with other "
            "numbers under `parallel`"
        )
    if jax.process_count() > 1 and not any(one.process_index == jax.process_index() for one in found[:count]):
        raise TargetError(
            f"{path}: found no device of this process ({jax.process_index()}) among those given; must have one; "
            "load in the processes whose devices these are"
        )
    return found[:count]


def _approve(trust: str | os.PathLike[str] | Policy | None) -> Approve | None:
    """What a policy asks of a bundle; None without one, and then the packages that verify need not be installed."""
    if trust is None:
        return None
    from rpac.trust import Policy, approved, load_policy

    return partial(approved, trust if isinstance(trust, Policy) else load_policy(trust))


@functools.cache
def _say_once_that_nothing_is_trusted() -> None:
    _LOG.info(
        "bundles are loaded without a trust policy: their hashes show damage, not who made them (rpac.load, trust=)"
    )


def _given_devices(device: object, devices: object) -> list[jax.Device]:
    """The devices that the caller names. Raises TargetError for what is none."""
    if device is not None and devices is not None:
        raise TargetError("found both device and devices; must be one of the two; name all of them under devices")
    name, given = ("devices", devices) if device is None else ("device", [device])
    if not isinstance(given, Iterable) or isinstance(given, (str, Mapping)):
        raise TargetError(f"{name}: found {given!r}; must be a list of jax devices, such as jax.devices()")
    found = list(given)
    for one in found:
        if not (hasattr(one, "device_kind") and hasattr(one, "platform")):
            fix = f", or pass target={one!r} in its place" if isinstance(one, str) and one in PLATFORMS else ""
            raise TargetError(
                f"{name}: found {one!r}, a {type(one).__name__}; must be a jax device; pass one of jax.devices(){fix}"
            )
    if not found or len(set(found)) < len(found):
        raise TargetError(f"{name}: found {found}; must be one device or more, each once, such as jax.devices()")
    return found


def _local_devices(target: str | None) -> list[jax.Device]:
    platform = target if target in PLATFORMS else None
    skip_absent_tpu()
    try:
        return list(jax.local_devices(backend=platform))
    except RuntimeError as error:
        wanted = f"a {platform.upper()}" if platform else "any device"
        raise TargetError(
            f"JAX does not find {wanted} ({error}); check JAX_PLATFORMS and what it has installed"
        ) from error


def load_layers(path: str | os.PathLike[str], target: str | None = None, **options: Any) -> dict[str, Engine]:
    """An engine for each kind of layers of a bundle, by name; the arguments are those of `load`, and what it raises."""
    targets = read_manifest(path, options.get("timeout_s")).targets.values()
    layers = dict.fromkeys(one.layer for one in targets)
    return {layer: load(path, target, layer=layer, **options) for layer in layers}


def _choose(
    path: str, target: str | None, layer: str | None, device: jax.Device, expect_digest: str | None, manifest: Manifest
) -> Target:
    """The target for a device, of one kind of layers; of any kind where `layer` is None."""
    if expect_digest is not None and digest(manifest) != expect_digest:
        raise BundleError(
            f"{path}: its digest is {digest(manifest)}; must be {expect_digest}, as expect_digest says; get the bundle that you "
            "mean, or find out who replaced it"
        )
    kind = device.device_kind
    kinds = (kind, device.platform)  # a portable target is for all devices of a platform
    of_device = [one for one in manifest.targets.values() if one.device_kind in kinds and target in (None, one.name)]
    if not of_device:
        has = ", ".join(f"{one.key} ({one.device_kind})" for one in manifest.targets.values())
        asked = "" if target is None else f"target {target!r} and "
        raise TargetError(
            f"{path}: found {asked}device {device} of kind {kind!r}; the bundle has {has}; "
            "load a target of this device's kind, or build one"
        )
    for one in of_device:
        if layer in (None, one.layer):
            return one
    names = ", ".join(repr(one.layer) for one in of_device)
    raise TargetError(
        f"{path}: found layer {layer!r}; the model's kinds of layers are {names}; name one of them with layer=, or load all "
        "with rpac.load_layers"
    )


def _use_executables(
    path: str, target: Target, without: Sequence[str], device: jax.Device, allow_compile: bool
) -> bool:
    """Whether the executables run here. `without`: what has none. Raises TargetError where they do not and nothing else may."""
    if without and target.name in PLATFORMS:
        return False  # a portable target has that tier alone, unless it was built for one CPU
    misfit = (
        f"holds no executable of {', '.join(without)}; must hold one of every program; build it again"
        if without
        else _misfit(target, device)
    )
    if misfit is None:
        return True
    if not allow_compile:
        raise TargetError(
            f"{path}: target {target.name} {misfit}, or compile its portable programs here with allow_compile=True"
        )
    _LOG.warning("%s: target %s %s; compiling its portable programs (allow_compile)", path, target.name, misfit)
    return False


def _misfit(target: Target, device: jax.Device) -> str | None:
    """What the executables were compiled for, where this process has something else, and the fix."""
    found = build_string(device.client)
    if device.platform == "cpu":
        built, made, fix = target.toolchain.get("cpu_build"), "for", "build the bundle on this machine"
    else:
        version = target.toolchain.get("libtpu", "of that build")
        built, made = target.toolchain.get("libtpu_build"), "by libtpu build"
        fix = f"install libtpu {version}, build the bundle with this one"
    return (
        None
        if built == found
        else f"was compiled {made} {built!r}; this process has {found!r}; must be the same; {fix}"
    )
