"""The data of a report: plain values, of which the page and the JSON are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from rpac.report.checks import Check
from rpac.schedule.call_report import DEFINITIONS

MEANINGS: Final[Mapping[str, str]] = {
    **{name: DEFINITIONS[name] for name in ("seconds", "mbu", "mfu", "needed_bytes", "needed_flops")},
    "all_layers_seconds": "the seconds of each kind of layer times the number of such layers; attention alone",
    "tokens_per_second": "new tokens of a batch over all_layers_seconds, on the devices of one replica",
    "dollars_per_million_tokens": "price of the chips of one replica for all_layers_seconds, over the batch's new tokens, "
    "times a million; attention alone, with the chips always busy",
    "whole_steps": "the model's whole step as `rpac predict --step` predicts it; needed bytes are those of the parameters too, "
    "and needed flops those of all matrix products as compiled",
}


@dataclass(frozen=True)
class Bound:
    """What limits a batch. `name`: HBM, MXU, issue, latency, balanced or XLA; `words` say it with figures."""

    name: str
    words: str


@dataclass(frozen=True)
class Peer:
    """What another kernel takes for the same batch, in seconds. `basis`: predicted, or measured, and by whom."""

    name: str
    seconds: float
    basis: str


@dataclass(frozen=True)
class Timing:
    """One batch on one kind of layer: lengths in tokens, `seconds` for the whole call of one layer."""

    batch: str
    kind: str
    sequences: int
    new_tokens: int
    context: float
    program: str
    seconds: float
    kernel_seconds: float
    mbu: float
    mfu: float
    moved_bytes: int
    bound: Bound
    peers: tuple[Peer, ...]


@dataclass(frozen=True)
class Kernel:
    """What was planned for one source, or chosen by the tuner. Bytes are per core."""

    source: str
    tokens: tuple[int, ...]
    decode: str
    block: str
    origin: str
    vmem_need: int
    vmem_bytes: int
    decisions: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """The cache of one layer on one device, in bytes."""

    page_bytes: int
    padding_bytes: int
    num_pages: int
    cache_bytes: int
    usable_hbm_bytes: int


@dataclass(frozen=True)
class Layer:
    """One kind of layers; `count` is how many the model has, None where nobody said."""

    name: str
    count: int | None
    memory: Memory
    kernels: tuple[Kernel, ...]
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class Step:
    """One batch through all layers. None where the number of layers, or the price, was not given."""

    batch: str
    kind: str
    new_tokens: int
    all_layers_seconds: float | None
    tokens_per_second: float | None
    dollars_per_million_tokens: float | None


@dataclass(frozen=True)
class WholeStep:
    """One batch through the model's whole step: all layers, and what is around them. MBU and MFU are those of one device.

    `parts`: shares of the time by what takes it. `by_bytes`: the share that no schedule was walked for.
    """

    batch: str
    program: str
    function: str
    seconds: float
    tokens_per_second_per_chip: float
    mbu: float
    mfu: float
    parts: Mapping[str, float]
    by_bytes: float


@dataclass(frozen=True)
class Option:
    """One spec or bundle on one kind of chip: what one may rent. `devices` and `chips` are those of one replica.

    `constants`: of the timing model, each with where it comes from. `compiler_verified`: whether the reading of libtpu's
    schedules is.
    """

    name: str
    target: str
    devices: int
    chips: float
    price: float | None
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    all_caches_bytes: int | None
    compiler: str
    compiler_verified: bool
    constants: tuple[str, ...]
    whole_steps: tuple[WholeStep, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name} on {self.target}"

    @property
    def caches_of_hbm(self) -> float | None:
        """The caches of all layers over the HBM that programs may use; above 1 they do not fit, and the weights need room too."""
        if self.all_caches_bytes is None:
            return None
        return self.all_caches_bytes / self.layers[0].memory.usable_hbm_bytes

    def step(self, batch: str) -> Step | None:
        return next((one for one in self.steps if one.batch == batch), None)


@dataclass(frozen=True)
class Subject:
    """A spec or a bundle as given. `digest`: that of a bundle's manifest, which covers every file.

    `check` is None where none was given, `receipt` where no key was or where it is a spec; its form is that of `rpac receipt`.
    """

    name: str
    path: str
    what: str
    spec_hash: str
    digest: str | None
    shape: str
    check: Check | None
    receipt: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Report:
    """A whole report. `missing` says what is not known, and why. `batches` in the order in which they are told."""

    subjects: tuple[Subject, ...]
    options: tuple[Option, ...]
    batches: tuple[str, ...]
    missing: tuple[str, ...]
    versions: Mapping[str, str]
    command: str

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the meanings of its fields under `definitions`."""
        return {**asdict(self), "definitions": dict(MEANINGS)}
