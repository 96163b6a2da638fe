"""What a valid spec is: frozen data, with the values that follow from it. No YAML here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from rpac.contract.attention import Attention, Serving, plain
from rpac.contract.mesh import ONE_DEVICE, Mesh
from rpac.errors import Problem, SpecError

TARGETS = ("tpu7x", "v6e", "v5p", "v5e", "cpu", "gpu")
# What else one may look for among the targets, and what there is to do.
NO_TARGETS = {
    "v4": "leave it out: a v4 chip serves as one device with two cores, but without a chip libtpu describes it only as two "
    "devices with one core each, so no executable built here would load"
}
MIN_DEFAULT_BUCKET = 16


@dataclass(frozen=True)
class Spec:
    """A valid spec. `source` is the text as given and `file` its name: neither takes part in equality or `hash`.

    `model` and `serving` are of one device of `mesh`: with `parallel` in the spec, the text has the heads of all together.
    `layers`: the kinds of attention layers of a model that has several, by name; `parts` are specs of one kind each, which
    know its name and the `whole`. `step` names the user's function for whole steps of the model, as `package.module:function`.
    """

    name: str
    model: Attention
    serving: Serving
    targets: tuple[str, ...]
    source: str = field(compare=False, repr=False)
    file: str = field(compare=False)
    mesh: Mesh = ONE_DEVICE
    layers: tuple[tuple[str, Attention], ...] = ()
    layer: str = ""
    whole: Spec | None = field(default=None, compare=False, repr=False)
    step: str = ""

    def meaning(self) -> dict[str, Any]:
        """The spec as plain data; comments and layout of the file are gone.

        Sizes that were left out are filled in; a feature that is not used is not there, so that a spec means the same
        after others were added.
        """
        return {
            "name": self.name,
            "model": plain(self.model),
            "serving": plain(self.serving),
            "targets": list(self.targets),
            **({} if self.mesh == ONE_DEVICE else {"mesh": self.mesh.as_dict()}),
            **({"step": self.step} if self.step else {}),
            **({"layers": {name: plain(model) for name, model in self.layers}} if self.layers else {}),
        }

    @cached_property
    def parts(self) -> tuple[Spec, ...]:
        """What kernels are made of: a spec for each kind of layer, or this one where there is one kind."""
        if not self.layers:
            return (self,)
        return tuple(replace(self, model=model, layers=(), layer=name, whole=self) for name, model in self.layers)

    def part(self, layer: str) -> Spec:
        """The spec of one kind of layer, by name; of a spec with one kind, itself for the empty name.

        Raises SpecError, naming the kinds, for another.
        """
        for part in self.parts:
            if part.layer == layer:
                return part
        names = ", ".join(part.layer for part in self.parts)
        allowed = f"must be one of {names}" if self.layers else "must be left out: the model has one kind of layer"
        raise SpecError([Problem(self.file, None, None, "layers", f"layer {layer!r}", allowed, "name one of them")])

    @cached_property
    def hash(self) -> str:
        """sha256 of the meaning, 64 hex digits: equal for files that differ only in comments or written defaults.

        That of the whole, in a part.
        """
        if self.whole is not None:
            return self.whole.hash
        text = json.dumps(self.meaning(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def default_token_buckets(max_num_tokens: int) -> tuple[int, ...]:
    """Powers of two from 16 below `max_num_tokens`, then `max_num_tokens` itself."""
    buckets = []
    bucket = MIN_DEFAULT_BUCKET
    while bucket < max_num_tokens:
        buckets.append(bucket)
        bucket *= 2
    return (*buckets, max_num_tokens)
