"""Whole steps of a model in a server: loaded as they were built, given the parameters once, and run batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax

from rpac.batch import Batch, Limits
from rpac.batch.select import advice
from rpac.bundle import LoadedSteps
from rpac.contract.arrays import index_of
from rpac.contract.kind import Int32s, Kind
from rpac.contract.program import Variant
from rpac.contract.step import StepArray, StepProgram, builder
from rpac.devices.placement import Placement
from rpac.devices.process import require_runtime
from rpac.engine.arguments import shown
from rpac.engine.choose import Chooser
from rpac.engine.donation import donating
from rpac.engine.events import BatchRun, Count, Observer, Recorder, Totals
from rpac.engine.step_arguments import Leaves
from rpac.engine.step_canary import check_step
from rpac.engine.step_slot import StepSlot
from rpac.engine.warmup import Warming
from rpac.engine.watchdog import Watchdog
from rpac.errors import BatchError, SelectionError

StepCall = Callable[..., tuple[Any, Any]]

_METADATA = ("kv_lens", "page_indices", "cu_q_lens", "distribution")


class StepEngine:
    """The steps of one target on its devices; made by `load_steps`. Safe to call from several threads.

    `limits` are of one device, and hold for all kinds of the model's layers. `bind` gives what runs the steps.
    """

    def __init__(
        self,
        loaded: LoadedSteps,
        devices: Sequence[jax.Device],
        use_executables: bool,
        observer: Observer | None = None,
        watchdog_s: float | None = None,
    ) -> None:
        manifest, model = loaded.manifest, loaded.steps.model
        self.name: str = manifest.name
        self.target: str = loaded.target.name
        self.function: str = loaded.steps.function
        self.limits: Limits = manifest.limits
        self.placement = Placement(manifest.mesh, devices)
        self._recorder = Recorder(observer)
        self._watchdog = None if watchdog_s is None else Watchdog(watchdog_s, self._recorder.overdue)
        dims = {
            one.layer: one.programs[0].args[index_of(one.programs[0].args, "kv_cache")]
            for one in manifest.targets.values()
            if one.name == self.target
        }
        self._build_caches = builder(model.caches_tree)
        names = Leaves.names("caches", self._build_caches(range(len(model.caches))))
        self._cache_dims = [dims[layer] for layer in model.caches]
        caches = [
            StepArray.of(one, manifest.mesh)._replace(name=name)
            for one, name in zip(self._cache_dims, names, strict=True)
        ]
        self._params = Leaves("params", model.params, self.placement)
        self._caches = Leaves("caches", caches, self.placement)
        self._slots = {
            program.variant: StepSlot(
                program,
                model.params,
                caches,
                self.limits,
                loaded.blobs,
                self.placement,
                use_executables,
                self._recorder,
                self._watchdog,
            )
            for program in loaded.steps.programs
        }
        self._chooser = Chooser(self._slots, self.limits, manifest.mesh)

    def __repr__(self) -> str:
        devices, steps = ", ".join(map(str, self.placement.devices)), ", ".join(map(str, self._slots))
        ready = f"{len(self.ready)} of {len(self._slots)} ready"
        return f"<StepEngine {self.name}, {self.function} for {self.target} on {devices}: {steps}; {ready}>"

    @property
    def device(self) -> jax.Device:
        """The device that steps run on, or the first of several."""
        return self.placement.devices[0]

    @cached_property
    def programs(self) -> Mapping[Variant, StepProgram]:
        """What the bundle says of each step that this engine can run."""
        return MappingProxyType({variant: slot.program for variant, slot in self._slots.items()})

    @property
    def params(self) -> tuple[StepArray, ...]:
        """The parameters that the steps were compiled for: names, shapes, dtypes, and how they are cut over the mesh."""
        return self._params.arrays

    @property
    def counts(self) -> Mapping[Variant, Count]:
        """What ran so far, by step; those that never ran are absent."""
        return self._recorder.counts

    @property
    def ready(self) -> frozenset[Variant]:
        """The steps whose calls load and compile nothing any more."""
        return frozenset(variant for variant, slot in self._slots.items() if slot.is_ready)

    @property
    def overdue(self) -> Variant | None:
        """The step that has not returned for longer than `watchdog_s`, now; None where all is well, or without a watchdog."""
        return None if self._watchdog is None else self._watchdog.overdue

    @property
    def totals(self) -> Totals:
        """The sums of all events so far, at one moment."""
        return self._recorder.totals()

    def select(self, tokens: int, distribution: Sequence[int] | Int32s) -> Variant:
        """The step that runs a batch, by its token bucket and the batch's distribution. Raises SelectionError."""
        return self._chooser.select(tokens, distribution)

    def warm(self, variants: Iterable[Variant] | None = None, *, background: bool = False) -> Warming:
        """Makes steps ready now, all by default, several at once; after it a call to them traces and compiles nothing.

        `background=True` returns at once and works in one thread, in the order given. `wait` on what is returned raises what
        went wrong, a TargetError or a BundleError; without `background` this raises it.
        """
        require_runtime()
        chosen = list(self._slots if variants is None else variants)
        threads = 1 if background else min(len(chosen), os.cpu_count() or 1)
        warming = Warming([(variant, self.slot(variant).ready) for variant in chosen], threads)
        if not background:
            warming.wait()
        return warming

    def new_caches(self) -> Any:
        """Caches of all layers, all zeros, in the structure that the steps take, where they want them: for the first call."""
        require_runtime()
        made = [
            jax.numpy.zeros(one.shape, one.dtype, device=self.placement.cut(one.cuts)) for one in self._caches.arrays
        ]
        return self._build_caches(made)

    def put(self, params: Any) -> Any:
        """The parameters on the devices, cut as the steps want them: of arrays of the host, or of any device.

        Raises BatchError for another structure, shape or dtype.
        """
        leaves, tree = self._params.flatten(params)
        self._params.check_shapes(leaves)
        return jax.tree.unflatten(tree, jax.device_put(leaves, self._params.shardings))

    def bind(self, params: Any) -> BoundSteps:
        """What runs the steps with these parameters, which are checked here, once. They are not donated.

        `params` is a tree as the build's function describes it, of jax arrays on this engine's devices: `put` places them.
        Raises BatchError, naming the first leaf of another shape, dtype, device or sharding.
        """
        require_runtime()
        leaves, _ = self._params.flatten(params)
        self._params.check(leaves)
        return BoundSteps(self, leaves)

    def slot(self, variant: Variant) -> StepSlot:
        if variant not in self._slots:
            if not isinstance(variant, tuple) or len(variant) != 2:
                raise SelectionError(f"{variant!r} is no step; must be a variant such as Variant('decode', 8)")
            raise SelectionError(advice(self._slots, self.limits, variant))
        return self._slots[variant]


class BoundSteps:
    """The steps of a StepEngine with parameters; made by its `bind`. Safe to call from several threads."""

    def __init__(self, engine: StepEngine, params: Sequence[jax.Array]) -> None:
        self.engine = engine
        self._params = tuple(params)

    def __call__(
        self,
        caches: Any,
        token_ids: Any,
        positions: Any,
        batch: Batch | Sequence[Any],
        *extra: Any,
        validate: bool = True,
    ) -> tuple[Any, Any]:
        """Runs one batch: `(outputs, caches)`, as the step's function returns them.

        `token_ids` and `positions` are int32 `[tokens]`, a token bucket. `batch` is a `rpac.Batch`, or its four arrays in the
        contract's order; the host selects the step by them, so give them as numpy arrays. `extra` are the step's further
        arguments. `caches` are jax arrays on this engine's devices; they are donated, use those returned. The other arrays are
        jax arrays there, or numpy arrays. `validate=False` leaves out the check of the metadata's values.

        Raises BatchError, or SelectionError with the spec lines that would add the batch; the caches are then still the caller's.
        """
        engine, recorder = self.engine, self.engine._recorder
        require_runtime()
        try:
            metadata = self._metadata(batch)
            variant, event = engine._chooser.choose(self._tokens(token_ids), metadata, validate)
        except (BatchError, SelectionError) as error:
            recorder.refused(error)
            raise
        return self._run(engine.slot(variant), event, caches, (token_ids, positions, *metadata), extra)

    def step(self, kind: Kind, tokens: int) -> StepCall:
        """One step, as a call of the same arguments that selects nothing and does not check the metadata's values: the caller
        says by the kind what the batch is. Raises SelectionError where the bundle has no such step.
        """
        variant = Variant(kind, tokens)
        slot = self.engine.slot(variant)

        def call(
            caches: Any, token_ids: Any, positions: Any, batch: Batch | Sequence[Any], *extra: Any
        ) -> tuple[Any, Any]:
            return self._run(slot, None, caches, (token_ids, positions, *self._metadata(batch)), extra)

        return call

    def canary(self, *extra: Any, variants: Iterable[Variant] | None = None) -> None:
        """Runs steps on a small batch, the executable and the portable step compiled here, and compares all that they return.

        `extra`: the step's further arguments, which must have the shapes that all of `variants` take; by default these are all
        steps. Takes the memory of the caches, and for each step the time of a compile: for a first run on new machines.
        A step that differs raises CheckError, now and at every later use.
        """
        engine = self.engine
        for variant in engine.programs if variants is None else variants:
            slot = engine.slot(variant)
            more, _ = slot.extra.flatten(extra)
            slot.extra.check(more, host=True)
            check_step(slot, self._params, engine._cache_dims, more, engine.limits, engine.placement, engine._recorder)

    def _run(
        self, slot: StepSlot, event: BatchRun | None, caches: Any, given: Sequence[Any], extra: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        """Checks what a step is given and runs it. `event`: what an observer is told of the batch, where the host read it."""
        engine, recorder = self.engine, self.engine._recorder
        try:
            leaves, tree = engine._caches.flatten(caches)
            engine._caches.check(leaves)
            more, _ = slot.extra.flatten(extra)
            rest = [*given, *more]
            slot.rest.check(rest, host=True)
        except BatchError as error:
            recorder.refused(error)
            raise
        run = slot.ready()
        # Told before the run, so that an observer which ends this call loses neither its results nor the donated caches.
        if event is not None:
            recorder.tell(event)
        try:
            with donating(*leaves):
                results = run(self._params, [*leaves, *rest])
        except BatchError as error:
            recorder.refused(error)
            raise
        if event is not None:
            recorder.count(event)
        count = len(leaves)
        return slot.outputs(results[count:]), jax.tree.unflatten(tree, results[:count])

    def _metadata(self, batch: Batch | Sequence[Any]) -> tuple[Any, ...]:
        """The four arrays of a batch."""
        metadata = batch.metadata if isinstance(batch, Batch) else tuple(batch)
        if len(metadata) != len(_METADATA):
            raise BatchError(
                f"batch is {len(metadata)} arrays; must be {', '.join(_METADATA)}; pass a rpac.Batch, or its `metadata`"
            )
        return metadata

    def _tokens(self, token_ids: Any) -> int:
        """Tokens of one replica."""
        shape: tuple[int, ...] = getattr(token_ids, "shape", ())
        if len(shape) != 1:
            raise BatchError(
                f"token_ids are {shown(token_ids)}; must be int32[tokens], a token bucket; pad them to one"
            )
        tokens, rest = divmod(int(shape[0]), self.engine.placement.mesh.data)
        if rest:
            raise BatchError(
                f"token_ids have {shape[0]} rows; must be a multiple of {self.engine.placement.mesh.data}, as many for each "
                "data-parallel replica; pad them"
            )
        return tokens
