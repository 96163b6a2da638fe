"""What the installations into servers share: versions, functions replaced wherever they are named, and the way back."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import update_wrapper
from types import TracebackType
from typing import Any, NoReturn

import jax

from rpac.adapters._arguments import Programs, spec_lines
from rpac.adapters._common import Adapter, wrong_ones
from rpac.errors import SelectionError, TargetError

_MARK = "rpac_installed"


@dataclass
class Installation:
    """rpac in the place of a server's functions, until `uninstall`, or to the end of a `with` block.

    `replaced` lists the names that changed, as `module.name`. Both ends clear JAX's caches of compiled functions, so that
    nothing that was traced before runs with the other attention.
    """

    package: str
    version: str
    replaced: list[str] = field(default_factory=list)
    _undo: ExitStack = field(default_factory=ExitStack, repr=False)

    def replace(self, module: str, name: str, new: Callable[..., Any]) -> None:
        """Puts `new` in place of a function wherever a module of the package names it; modules that are imported later take
        it from the first. `new` gets the name, the docs and the signature of what it replaces. Raises TargetError where
        there is no such function, or another installation."""
        old = named(module, name)
        if hasattr(old, _MARK):
            raise TargetError(
                f"{module}.{name} is rpac's already; must be the server's; uninstall the first installation"
            )
        # Without its attributes: those of a jitted function, such as `lower`, are of the server's own kernel.
        update_wrapper(new, old, updated=())
        setattr(new, _MARK, True)
        self._undo.callback(self._swap, new, old)
        self._swap(old, new)

    def override(self, module: str, owner: str, name: str, new: Callable[..., Any]) -> None:
        """Puts `new` in place of a method of a class. Raises TargetError where there is none."""
        old = method(module, owner, name)
        target = named(module, owner)
        self._undo.callback(setattr, target, name, old)
        setattr(target, name, new)
        self.replaced.append(f"{module}.{owner}.{name}")

    def finish(self) -> Installation:
        """Forgets what was traced with the server's own functions."""
        self.replaced.sort()
        jax.clear_caches()
        return self

    def uninstall(self) -> None:
        """Puts the server's own functions back; a second call does nothing."""
        self._undo.close()
        self.replaced = []
        jax.clear_caches()

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()

    def _swap(self, old: Any, new: Any) -> None:
        for module in list(sys.modules.values()):
            name = getattr(module, "__name__", "")
            if name != self.package and not name.startswith(f"{self.package}."):
                continue
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
                    self.replaced.append(f"{name}.{attribute}")


def begin(distribution: str, package: str, tested: Sequence[str], any_version: bool) -> Installation:
    """An installation that replaced nothing yet. Raises TargetError where the package is missing, or not as tested."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise TargetError(
            f"{distribution} is not installed; must be {' or '.join(tested)}; install it, or build a function for a copy of its "
            "kernel with the adapter alone"
        ) from None
    if version not in tested and not any_version:
        raise TargetError(
            f"{distribution} is {version}; must be {' or '.join(tested)}, the versions that rpac was tested in; install one of "
            "them, or pass any_version=True, which goes by names and signatures alone"
        )
    return Installation(package, version)


def engines_of(engine: Any) -> list[Programs]:
    """The engines to install: one, those of `rpac.load_layers`, or several in a list. Raises for what cannot be installed."""
    if isinstance(engine, Mapping):
        engine = list(engine.values())
    found = list(engine) if isinstance(engine, Sequence) else [engine]
    if not found:
        raise SelectionError(
            "found no engine; must be at least one; give one of `rpac.load`, or those of `rpac.load_layers`"
        )
    for one in found:
        devices = one.placement.mesh.devices
        if devices > 1:
            raise SelectionError(
                f"bundle {one.name} is for {devices} devices; must be for one: the server itself spreads attention over devices, "
                "and calls it with the heads, rows and pages of one; build without parallel, and with"
                + _of_one_device(one)
            )
    layouts = {one.kv_layout for one in found}
    if len(layouts) > 1:
        raise SelectionError(f"the engines have kv_layout {' and '.join(sorted(layouts))}; must all have the same")
    return found


def of_layers(adapters: Sequence[Adapter], make: Callable[[Adapter], Callable[..., Any]]) -> Callable[..., Any]:
    """One function out of those that `make` makes of each adapter, all of a peer's signature: a call goes to the one whose
    bundle has built in what is asked for, or, where none has, to the one that has most of it, which says what is missing."""
    functions = [make(one) for one in adapters]
    if len(functions) == 1:
        return functions[0]

    def attention(queries: Any, keys: Any, *args: Any, **options: Any) -> Any:
        asked = {
            "q_heads": queries.shape[1],
            "head_dim": queries.shape[2],
            "kv_heads": keys.shape[1],
            "sliding_window": options.get("sliding_window"),
            "soft_cap": options.get("soft_cap"),
            "update_cache": bool(options.get("update_kv_cache", True)),
            "causal": bool(options.get("use_causal_mask", True)),
        }
        fits = [sum(getattr(one.engine.model, key) == value for key, value in asked.items()) for one in adapters]
        return functions[fits.index(max(fits))](queries, keys, *args, **options)

    return attention


def require_page(adapters: Sequence[Adapter], **asked: Any) -> Adapter:
    """The adapter whose bundle's cache has pages as `asked`, the keys of `Adapter.page_sizes`.

    Raises SelectionError with the lines of a spec where there is none.
    """
    refusals = []
    for one in adapters:
        wrong = wrong_ones(one.page_sizes(**asked))
        if not wrong:
            return one
        refusals.append(
            one.refusal(wrong, "start the server with the bundle's sizes", "start the server with the bundle's dtype")
        )
    raise refusals[0]


def refusing(what: str, why: str) -> Callable[..., NoReturn]:
    """A function that stands where the server would do what an installed bundle cannot follow."""

    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise SelectionError(f"{what}: {why}")

    return refuse


def _of_one_device(engine: Programs) -> str:
    """The lines of a spec for one device's part of what the bundle is for."""
    model, limits = engine.model, engine.limits
    heads = {"q_heads": model.q_heads, **({"kv_heads": model.kv_heads} if model.rope_dim is None else {})}
    sizes = {"max_num_seqs": limits.max_num_seqs, "num_pages": limits.num_pages}
    return spec_lines(model=heads, serving=sizes)


def named(module: str, name: str) -> Any:
    """What a module of the server has by that name. Raises TargetError where it has not."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise TargetError(f"{_missing(f'{module}.{name}')}: {error}") from error


def method(module: str, owner: str, name: str) -> Any:
    """A method of one of the server's classes. Raises TargetError where the class has none of that name of its own."""
    methods = vars(named(module, owner))
    if name not in methods:
        raise TargetError(_missing(f"{module}.{owner}.{name}"))
    return methods[name]


def _missing(name: str) -> str:
    return f"{name} is not there; this version of the server is built otherwise than those that rpac was tested in"
