"""What the installations into servers share: versions, functions replaced wherever they are named, and the way back."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn

import jax

from rpac.adapters._arguments import Programs
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
    _functions: list[tuple[Any, Any]] = field(default_factory=list, repr=False)  # the server's and ours
    _attributes: list[tuple[Any, str, Any]] = field(default_factory=list, repr=False)  # of classes, and what they were

    def replace(self, module: str, name: str, make: Callable[[Any], Any]) -> None:
        """Puts `make(old)` in place of a function wherever a module of the package names it; modules that are imported
        later take it from the first. Raises TargetError where there is no such function, or another installation."""
        old = named(module, name)
        if hasattr(old, _MARK):
            raise TargetError(
                f"{module}.{name} is rpac's already; must be the server's; uninstall the first installation"
            )
        new = make(old)
        setattr(new, _MARK, True)
        self._functions.append((old, new))
        self._swap(old, new)

    def override(self, module: str, owner: str, name: str, make: Callable[[Any], Any]) -> None:
        """Puts `make(old)` in place of a method of a class. Raises TargetError where there is none."""
        target = named(module, owner)
        if name not in vars(target):
            raise TargetError(_missing(f"{module}.{owner}.{name}"))
        old = vars(target)[name]
        self._attributes.append((target, name, old))
        setattr(target, name, make(old))
        self.replaced.append(f"{module}.{owner}.{name}")

    def finish(self) -> Installation:
        """Forgets what was traced with the server's own functions."""
        self.replaced.sort()
        jax.clear_caches()
        return self

    def uninstall(self) -> None:
        """Puts the server's own functions back; a second call does nothing."""
        for old, new in reversed(self._functions):
            self._swap(new, old)
        for target, name, old in reversed(self._attributes):
            setattr(target, name, old)
        self._functions, self._attributes, self.replaced = [], [], []
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
    for one in found:
        devices = one.placement.mesh.devices
        if devices > 1:
            raise SelectionError(
                f"bundle {one.name} is for {devices} devices; must be for one: the server itself spreads attention over devices, "
                "and calls it with the heads, rows and pages of one; write a spec with `rpac init --per-device`, or build "
                "without parallel, and with\n" + _of_one_device(one)
            )
    layouts = {one.kv_layout for one in found}
    if len(layouts) > 1:
        raise SelectionError(f"the engines have kv_layout {' and '.join(sorted(layouts))}; must all have the same")
    return found


def of_layers(engines: Sequence[Programs], functions: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """One function of a peer's signature out of those of several engines: a call goes to the one whose bundle has built in
    what is asked for, or, where none has, to the one that has most of it, which says what is missing."""
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
        fits = [sum(getattr(one.model, key) == value for key, value in asked.items()) for one in engines]
        return functions[fits.index(max(fits))](queries, keys, *args, **options)

    return attention


def require_page(asked: Mapping[str, Any], engines: Iterable[Programs]) -> Programs:
    """The engine whose cache has pages as `asked`: some of `kv_heads`, `head_dim`, `kv_dtype`, `page_size` and their values.

    Raises SelectionError with the lines of a spec where there is none.
    """
    lines: list[str] = []
    for one in engines:
        built = {
            "page_size": one.limits.page_size,
            **{key: getattr(one.model, key, None) for key in asked if key != "page_size"},
        }
        wrong = {key: value for key, value in asked.items() if built[key] != value}
        if not wrong:
            return one
        lines = lines or [
            "; ".join(
                f"{key} is {value}, must be {built[key]}, as in bundle {one.name}" for key, value in wrong.items()
            ),
            *_spec_lines(wrong),
        ]
    raise SelectionError(
        f"the cache that the server asks for: {lines[0]}; start it with those, or build with these lines, where a spec "
        "allows them\n" + "\n".join(lines[1:])
    )


def refusing(what: str, why: str) -> Callable[[Any], Callable[..., NoReturn]]:
    """Makes a function that stands where the server would do what an installed bundle cannot follow."""

    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise SelectionError(f"{what}: {why}")

    return lambda old: refuse


def _of_one_device(engine: Programs) -> str:
    """The lines of a spec for one device's part of what the bundle is for."""
    model, limits = engine.model, engine.limits
    heads = {"q_heads": model.q_heads, **({"kv_heads": model.kv_heads} if model.rope_dim is None else {})}
    sizes = {"max_num_seqs": limits.max_num_seqs, "num_pages": limits.num_pages}
    lines = ("model:", *(f"  {key}: {value}" for key, value in heads.items()))
    return "\n".join((*lines, "serving:", *(f"  {key}: {value}" for key, value in sizes.items())))


def named(module: str, name: str) -> Any:
    """What a module of the server has by that name. Raises TargetError where it has not."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise TargetError(f"{_missing(f'{module}.{name}')}: {error}") from error


def _spec_lines(wrong: Mapping[str, Any]) -> list[str]:
    model = [f"  {key}: {value}" for key, value in wrong.items() if key != "page_size"]
    serving = [f"  page_size: {wrong['page_size']}"] if "page_size" in wrong else []
    return [*(["model:", *model] if model else []), *(["serving:", *serving] if serving else [])]


def _missing(name: str) -> str:
    return f"{name} is not there; this version of the server is built otherwise than those that rpac was tested in"
