"""What `make bench-models` predicts: every shipped spec in each layout that it can have, and the batches that it expects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from rpac.devices.chip import is_tpu
from rpac.spec import Spec, load_spec, parse_spec
from rpac.traffic.trace import Workload

SPECS: Final = Path(__file__).parents[2] / "specs"


@dataclass(frozen=True)
class Place:
    """A kind of layer of a spec, in one layout of the cache, on one target. `path` is the spec in that layout."""

    spec: Spec
    path: Path
    target: str

    @property
    def title(self) -> str:
        return f"{self.spec.name} {self.spec.layer}".strip()

    @property
    def layout(self) -> str:
        return "latent" if self.spec.model.rope_dim is not None else self.spec.serving.kv_layout


@dataclass(frozen=True)
class Case:
    kind: str
    workload: Workload


def places(folder: Path, names: list[str], targets: list[str]) -> Iterator[Place]:
    """The places of shipped specs, all where no names or targets are given; specs of the other layout are written to `folder`."""
    for path in sorted(SPECS.glob("*.yaml")):
        for variant in layouts(path, folder):
            spec = load_spec(variant)
            if names and not {spec.name, spec.name.removesuffix("-separate")} & {*names}:
                continue
            for part in spec.parts:
                for target in part.targets:
                    if target in (targets or part.targets) and is_tpu(target):
                        yield Place(part, variant, target)


def layouts(path: Path, folder: Path) -> list[Path]:
    """A spec as it is, and in the other layout where its model can have one and no spec of its own has it."""
    spec = load_spec(path)
    if spec.model.rope_dim is not None or path.with_stem(f"{path.stem}-separate").exists() or "-separate" in path.stem:
        return [path]
    other = "interleaved" if spec.serving.kv_layout == "separate" else "separate"
    fields = yaml.safe_load(path.read_text())
    fields["serving"]["kv_layout"] = other
    text = yaml.safe_dump(fields, sort_keys=False)
    written = folder / f"{path.stem}-{other}.yaml"
    parse_spec(text, written.name)
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(text)
    return [path, written]


def cases(spec: Spec) -> list[Case]:
    """Decode of all sequences at each expected length; chunks that fill a call, ending at the longest; and both at once."""
    serving = spec.serving
    rows, new, chunk = serving.max_num_seqs, serving.decode_len, serving.prefill_chunk
    longest = max(serving.context_lens)
    found = [
        Case("decode", Workload(f"decode {rows} x {length}", (new,) * rows, (length,) * rows))
        for length in sorted({max(length, new) for length in serving.context_lens})
    ]
    if longest < chunk:
        return found
    chunks = min(serving.max_num_tokens // chunk, rows)
    found.append(
        Case("prefill", Workload(f"prefill {chunks} x {chunk} of {longest}", (chunk,) * chunks, (longest,) * chunks))
    )
    decoding = rows // 2
    beside = min((serving.max_num_tokens - decoding * new) // chunk, rows - decoding)
    if decoding and beside > 0:
        label = f"mixed {decoding} x {longest} and {beside} x {chunk} of {longest}"
        q_lens = (new,) * decoding + (chunk,) * beside
        found.append(Case("mixed", Workload(label, q_lens, (longest,) * len(q_lens))))
    return found
