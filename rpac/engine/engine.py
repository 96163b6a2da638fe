"""The engine: selection, the call, and what prepares it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rpac.batch import Limits
from rpac.batch.build import Integers
from rpac.batch.select import advice
from rpac.bundle import LoadedTarget
from rpac.contract.arrays import ArrayDims, index_of, metadata_specs
from rpac.contract.attention import Attention
from rpac.contract.kind import KINDS, Int32s, Kind
from rpac.contract.program import Program, Variant
from rpac.devices.placement import Placement
from rpac.devices.process import require_runtime
from rpac.engine.arguments import in_order, refuse, shown
from rpac.engine.choose import Chooser
from rpac.engine.donation import donating
from rpac.engine.events import BatchRun, Count, Observer, Recorder, Totals
from rpac.engine.fill import fill, places
from rpac.engine.program import Slot
from rpac.engine.runtime import Results, Run, Traceable
from rpac.engine.traced import run_selected
from rpac.engine.warmup import Warming
from rpac.engine.watchdog import Watchdog
from rpac.errors import BatchError, SelectionError, TargetError

if TYPE_CHECKING:
    from rpac.engine.metrics import EngineCollector


class Engine:
    """The programs of one target on its devices; made by `load`. Safe to call from several threads.

    `model` and `limits` are of one device, where a bundle is for several.
    """

    def __init__(
        self,
        loaded: LoadedTarget,
        devices: Sequence[jax.Device],
        use_executables: bool,
        observer: Observer | None = None,
        watchdog_s: float | None = None,
    ) -> None:
        self.name: str = loaded.manifest.name
        self.layer: str = loaded.target.layer
        self.model: Attention = loaded.target.model or loaded.manifest.model
        self.kv_layout: str = loaded.manifest.kv_layout
        self.limits: Limits = loaded.manifest.limits.of_layers({self.layer: self.model})
        self.target: str = loaded.target.name
        self.placement = Placement(loaded.manifest.mesh, devices)
        self._recorder = Recorder(observer)
        self._watchdog = None if watchdog_s is None else Watchdog(watchdog_s, self._recorder.overdue)
        self._slots = {
            program.variant: Slot(
                program,
                self.limits,
                self.kv_layout,
                loaded.blobs,
                self.placement,
                use_executables,
                self._recorder,
                self._watchdog,
            )
            for program in loaded.target.programs
        }
        self._chooser = Chooser(self._slots, self.limits, self.placement.mesh)
        self._canary_turn = threading.Lock()
        self._taken = loaded.target.programs[0].args  # all programs of a spec take the same, but for the token bucket
        self._metadata = metadata_specs(self.limits)
        self._cache_at = index_of(self._taken, "kv_cache")
        first = index_of(self._taken, self._metadata[0].name)
        self._metadata_at = slice(first, first + len(self._metadata))

    def __repr__(self) -> str:
        name = " ".join(filter(None, (self.name, self.layer)))
        devices = ", ".join(map(str, self.placement.devices))
        programs = ", ".join(map(str, self._slots))
        return (
            f"<Engine {name} for {self.target} on {devices}: {programs}; {len(self.ready)} of {len(self._slots)} ready>"
        )

    @property
    def device(self) -> jax.Device:
        """The device that programs run on, or the first of several."""
        return self.placement.devices[0]

    def new_cache(self) -> jax.Array:
        """A cache of one layer, all zeros, of the contract's shape and where the programs want it: for the first call."""
        require_runtime()
        dims = self._taken[self._cache_at]
        return jax.numpy.zeros(self.placement.mesh.whole(dims).shape, dims.dtype, device=self.sharding("kv_cache"))

    def write_kv(
        self, kv_cache: jax.Array, keys: Any, values: Any, kv_lens: Integers, page_tables: Sequence[Integers]
    ) -> jax.Array:
        """The cache with K and V of whole sequences in it, for programs that only read it (`update_cache: false`): such as an
        encoder's, before the first call that attends to them.

        `keys` and `values` are `[tokens, kv_heads, head_dim]` in the cache's dtype, the sequences one after the other;
        `kv_lens` counts the tokens of each and `page_tables` lists its pages. `kv_cache` is donated, use the one returned.
        Compiled once for each number of pages and tokens. Raises BatchError for what does not fit, and SelectionError for
        latent attention or a bundle for several devices.
        """
        if self.model.rope_dim is not None or self.placement.mesh.devices > 1:
            found = "latent attention" if self.model.rope_dim is not None else f"{self.placement.mesh.devices} devices"
            raise SelectionError(
                f"the bundle is for {found}; must be for grouped attention on one device; write the cache of others by "
                "calls of a program that updates it"
            )
        require_runtime()
        pages, tokens = places(self.limits, kv_lens, page_tables)
        wanted = (int(tokens.max(initial=-1)) + 1, self.model.kv_heads, self.model.head_dim)
        for name, array in (("keys", keys), ("values", values)):
            if getattr(array, "shape", None) != wanted or getattr(array, "dtype", None) != np.dtype(
                self.model.kv_dtype
            ):
                refuse(ArrayDims(name, wanted, self.model.kv_dtype), array)
        self._slots[next(iter(self._slots))].arguments.check_cache(kv_cache)
        with donating(kv_cache):
            return fill(kv_cache, keys, values, pages, tokens, self.model, self.kv_layout)

    def sharding(self, name: str) -> jax.sharding.Sharding:
        """Where an argument or a result of the call lies, by name: one device, or parts on the devices of a mesh."""
        program = next(iter(self._slots.values())).program
        arrays = {dims.name: dims for dims in (*program.args, *program.results)}
        if name not in arrays:
            raise BatchError(f"{name!r} is no argument or result; must be one of {', '.join(arrays)}")
        return self.placement.sharding(arrays[name])

    @cached_property
    def programs(self) -> Mapping[Variant, Program]:
        """What the bundle says of each variant that this engine can run."""
        return MappingProxyType({variant: slot.program for variant, slot in self._slots.items()})

    @property
    def counts(self) -> Mapping[Variant, Count]:
        """What ran so far, by variant; those that never ran are absent."""
        return self._recorder.counts

    @property
    def ready(self) -> frozenset[Variant]:
        """The variants whose calls load and compile nothing any more."""
        return frozenset(variant for variant, slot in self._slots.items() if slot.is_ready)

    @property
    def totals(self) -> Totals:
        """The sums of all events so far, at one moment."""
        return self._recorder.totals()

    @property
    def overdue(self) -> Variant | None:
        """The program that has not returned for longer than `watchdog_s`, now; None where all is well, or without a watchdog."""
        return None if self._watchdog is None else self._watchdog.overdue

    def select(self, tokens: int, distribution: Sequence[int] | Int32s) -> Variant:
        """The variant that runs a batch; `rpac.batch.select.select` over what this engine holds."""
        return self._chooser.select(tokens, distribution)

    def warm(
        self, variants: Iterable[Variant] | None = None, *, canary: bool = False, background: bool = False
    ) -> Warming:
        """Makes programs ready now, all by default, several at once; after it a call to them compiles nothing.

        `canary=True` runs each on a stored batch too, one at a time on a cache of the contract's full shape: do that
        before the server makes its own. A program whose answer is not the oracle's is refused from then on.
        `background=True` returns at once and works in one thread, in the order given: a call that needs a program
        which is not ready yet makes it ready itself, or waits for it. `wait` on what is returned raises what went
        wrong, of these errors: TargetError, BundleError, CheckError; without `background` this raises it.
        """

        def job(slot: Slot) -> Callable[[], object]:
            return lambda: self._checked(slot) if canary else slot.ready()

        require_runtime()
        chosen = list(self._slots if variants is None else variants)
        # One after the other where other processes take part, because all of them must run the canaries in one order.
        alone = len(self.placement.local) == len(self.placement.devices)
        threads = 1 if background or not alone else min(len(chosen), os.cpu_count() or 1)
        warming = Warming([(variant, job(self._slot(variant))) for variant in chosen], threads)
        if not background:
            warming.wait()
        return warming

    def program(self, kind: Kind, tokens: int) -> Traceable:
        """One program as a function of the call's arguments, for use inside jit: the host picks.

        It is the portable program, compiled with what is around it; inside, the cache is updated in place, if the
        outer jit donates it. Called outside jit it compiles at its first call, and copies the cache. Shapes and dtypes
        are checked when it is traced. No value raises: build the metadata with `rpac.Batch`, which checks them. Raises
        SelectionError where the bundle has no such program.
        """
        require_runtime()
        return self._slot(Variant(kind, tokens)).traceable()

    def traced(
        self,
        *args: Any,
        **extra: Any,
    ) -> Results:
        """As the call, for use inside jit: the program is chosen on the device, by the distribution's value.

        The programs are those of the token bucket of `queries`. Nothing can raise for a value inside jit: where the
        distribution breaks the contract, or its program was not built, `out` is NaN in every row and the cache is as
        it was. Rows with other wrong values get NaN (docs/batch-contract.md): build the metadata with `rpac.Batch`. Raises
        BatchError or SelectionError while it is traced, for shapes, dtypes and the token bucket.
        """
        require_runtime()
        given = in_order(self._taken, args, extra)
        if self.placement.mesh.data > 1:
            raise SelectionError(
                "engine.traced chooses one program, and each data-parallel replica may need another; use engine.program, "
                "which the host picks"
            )
        tokens = self._tokens(given[0])
        built = [kind for kind in KINDS if Variant(kind, tokens) in self._slots]
        if not built:
            raise SelectionError(advice(self._slots, self.limits, Variant("mixed", tokens)))
        programs = {kind: self._slots[Variant(kind, tokens)].traceable() for kind in built}
        first = self._slots[Variant(built[0], tokens)]
        first.arguments.check_shapes(given)
        more = [jax.numpy.zeros(dims.shape, dims.dtype) for dims in first.program.results[2:]]
        return run_selected(programs, self.limits, self._taken, given, more)

    def collector(self) -> EngineCollector:
        """This engine's metrics for a server's own `prometheus_client` registry, which takes one collector alone:
        for several engines register `rpac.engine.metrics.EngineCollector(*engines)`.

        Raises TargetError where prometheus_client is not installed.
        """
        try:
            from rpac.engine.metrics import EngineCollector
        except ImportError as error:
            raise TargetError("metrics need prometheus_client; install rpac[metrics]") from error
        return EngineCollector(self)

    def metrics(self) -> str:
        """This engine's metrics in Prometheus's text format. Raises as `collector` does."""
        collector = self.collector()
        from rpac.engine.metrics import text_of

        return text_of(collector)

    def __call__(
        self,
        *args: Any,
        validate: bool = True,
        **extra: Any,
    ) -> Results:
        """Runs one batch: `(out, kv_cache)`, shapes and dtypes as docs/batch-contract.md has them.

        Where the bundle's spec has `log_sum_exp` there is a third result, `lse`, for `rpac.merge`.

        The arguments are queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution; of latent
        attention queries, queries_rope, new_kv, new_rope, and on from kv_cache; in this order, or by name. `extra`: what the
        bundle's spec makes programs take beside them, by name (`rpac.contract.features.ARGUMENTS`), such as `sinks`.

        `kv_cache` is a jax array on this engine's device; it is donated, use the one returned. The others are jax
        arrays there, or numpy arrays. Metadata is read on the host: give it as numpy, because an array on a TPU is
        waited for and copied back first. `validate=False` leaves out the check of the metadata's values, for callers
        that built it with `rpac.Batch`; shapes, dtypes and devices are always checked.

        Rows of `out` past cu_q_lens[k] are padding and hold anything. Raises BatchError, or SelectionError with the
        spec lines that would add the batch; `kv_cache` is then still the caller's. An observer is told of the batch
        before it runs.
        """
        require_runtime()
        try:
            given = in_order(self._taken, args, extra)
            event, run = self._accepted(given, validate)
        except (BatchError, SelectionError) as error:
            self._recorder.refused(error)
            raise
        # Told before the run, so that an observer which ends this call loses neither its results nor the donated cache.
        self._recorder.tell(event)
        try:
            with donating(given[self._cache_at]):
                results = run(given)
        except BatchError as error:
            self._recorder.refused(error)
            raise
        self._recorder.count(event)
        return results

    def _accepted(self, args: Sequence[Any], validate: bool) -> tuple[BatchRun, Run]:
        """What runs a batch. Nothing of it has run, nor is the cache donated, when this raises."""
        metadata = args[self._metadata_at]
        tokens = self._tokens(args[0])
        for dims, arg in zip(self._taken, args, strict=True):
            if isinstance(arg, jax.core.Tracer):
                raise BatchError(
                    f"{dims.name} is traced; must be an array with values: the program is chosen on the host; "
                    "inside jit use engine.traced or engine.program"
                )
        variant, event = self._chooser.choose(tokens, metadata, validate)
        slot = self._slots[variant]
        slot.arguments.check(args)
        return event, slot.ready()

    def _tokens(self, queries: Any) -> int:
        """Query rows of one replica."""
        if len(getattr(queries, "shape", ())) != 3:
            shape = f"[tokens, {self.model.q_heads}, {self.model.head_dim}]"
            raise BatchError(f"queries are {shown(queries)}; must be {self.model.q_dtype}{shape}; reshape them")
        tokens, rest = divmod(int(queries.shape[0]), self.placement.mesh.data)
        if rest:
            raise BatchError(
                f"queries have {queries.shape[0]} rows; must be a multiple of {self.placement.mesh.data}, as many for each "
                "data-parallel replica; pad them"
            )
        return tokens

    def _slot(self, variant: Variant) -> Slot:
        if not isinstance(variant, tuple) or len(variant) != 2:
            raise SelectionError(f"{variant!r} is no program; must be a variant such as Variant('decode', 8)")
        if variant not in self._slots:
            raise SelectionError(advice(self._slots, self.limits, variant))
        return self._slots[variant]

    def _checked(self, slot: Slot) -> None:
        """Makes a program ready and runs its canary; one at a time, because each takes the memory of a cache."""
        slot.check_canary(self._canary_turn)
