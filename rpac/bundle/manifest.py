"""What a bundle says of itself: the manifest's data, and its one form in bytes.

`manifest.json` is canonical: sorted keys, one-space indent, and a `digest` over all the rest. `parse` refuses bytes
that `render` would not have made of what they say, so that every flipped byte is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from rpac.batch import Limits
from rpac.bundle.schema import SHA256, Node
from rpac.bundle.steps import parse_steps, steps_data
from rpac.contract import arrays as layout
from rpac.contract.attention import Attention, plain
from rpac.contract.features import ARGUMENTS, Choice, Count, Flag, Number, Values, features_of
from rpac.contract.features import RESULTS as EXTRA_RESULTS
from rpac.contract.kind import KINDS, Kind
from rpac.contract.mesh import AXES, ONE_DEVICE, Mesh
from rpac.contract.program import Content, Program, Variant
from rpac.contract.step import Steps
from rpac.errors import BundleError

SCHEMA = 2  # 2: each program has a canary
MANIFEST = "manifest.json"
SPEC = "spec.yaml"
MAX_MANIFEST_BYTES = 16 << 20
MAX_BLOB_BYTES = 256 << 20
MAX_FILE_BYTES = 4 << 20
MAX_CANARY_BYTES = 1 << 20

_CACHE_AND_BATCH = ("kv_cache", "kv_lens", "page_indices", "cu_q_lens", "distribution")
ARGS = ("queries", "keys", "values", *_CACHE_AND_BATCH)
READ_ARGS = ("queries", *_CACHE_AND_BATCH)  # where the cache is not updated
LATENT_ARGS = ("queries", "queries_rope", "new_kv", "new_rope", *_CACHE_AND_BATCH)  # of latent attention
RESULTS = ("out", "kv_cache")

_NAME = r"[a-z0-9][a-z0-9.-]{0,63}"
_SERVER = r"[a-z0-9-]+==[0-9A-Za-z.+!-]{1,64}"
_LAYER = r"[a-z0-9][a-z0-9-]{0,31}"
_PATH = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*"
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Target:
    """All programs for one device kind. `topology` is what the executables were compiled for, None on cpu.

    Where a model has several kinds of layers there is a target for each, with the `layer`'s name and its `model`.
    """

    name: str
    device_kind: str
    topology: str | None
    toolchain: Mapping[str, str]
    programs: tuple[Program, ...]
    layer: str = ""
    model: Attention | None = None

    @property
    def key(self) -> str:
        """Its name in the manifest."""
        return f"{self.name}.{self.layer}" if self.layer else self.name

    @property
    def blobs(self) -> frozenset[Content]:
        """Every blob: both tiers and the canaries."""
        every = {blob for one in self.programs for blob in (one.exported, one.executable, one.canary)}
        return frozenset(blob for blob in every if blob is not None)


@dataclass(frozen=True)
class Manifest:
    """A whole bundle. `kv_layout` is the spec's, `files` maps paths in it (`spec.yaml`, `source/...`) to what must be there.

    `model`, `limits` and the arrays of programs are of one device of `mesh`. `server` is what it was built for, if for one:
    such as `vllm==0.32.0`. `steps` are those of each target by its name, where the build had a step.
    """

    name: str
    spec_hash: str
    model: Attention
    kv_layout: str
    limits: Limits
    targets: Mapping[str, Target]
    files: Mapping[str, Content]
    mesh: Mesh = ONE_DEVICE
    server: str = ""
    steps: Mapping[str, Steps] = field(default_factory=dict)

    @property
    def blobs(self) -> frozenset[Content]:
        """Every blob of every target and its steps."""
        of_targets = frozenset(blob for target in self.targets.values() for blob in target.blobs)
        return of_targets | frozenset(blob for steps in self.steps.values() for blob in steps.blobs)


def render(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`."""
    return _seal(as_data(manifest))


def as_data(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain data, without its digest."""
    return {
        "schema": SCHEMA,
        "name": manifest.name,
        "spec_hash": manifest.spec_hash,
        "model": plain(manifest.model),
        "kv_layout": manifest.kv_layout,
        "limits": manifest.limits.as_dict(),
        "files": {path: content._asdict() for path, content in manifest.files.items()},
        "targets": {
            target.key: {
                "device_kind": target.device_kind,
                "topology": target.topology,
                "toolchain": dict(target.toolchain),
                "programs": [_program_data(program) for program in target.programs],
                **({"layer": target.layer, "model": plain(target.model)} if target.model else {}),
            }
            for target in manifest.targets.values()
        },
        **({} if manifest.mesh == ONE_DEVICE else {"mesh": manifest.mesh.as_dict()}),
        **({"server": manifest.server} if manifest.server else {}),
        **({"steps": {name: steps_data(one) for name, one in manifest.steps.items()}} if manifest.steps else {}),
    }


def _program_data(program: Program) -> dict[str, Any]:
    return {
        "kind": program.variant.kind,
        "tokens": program.variant.tokens,
        "source": program.source,
        "plan": dict(program.plan),
        "args": [[dims.name, dims.dtype, list(dims.shape)] for dims in program.args],
        "results": [[dims.name, dims.dtype, list(dims.shape)] for dims in program.results],
        "exported": program.exported._asdict(),
        "executable": None if program.executable is None else program.executable._asdict(),
        "canary": None if program.canary is None else program.canary._asdict(),
        "flags": dict(program.flags),
        "aliases": dict(program.aliases),
        "memory": dict(program.memory),
        "check": None if program.check is None else dict(program.check),
    }


def digest(manifest: Manifest) -> str:
    """The sha256 that `manifest.json` holds of itself, 64 hex digits. It covers the hash of every file of the bundle."""
    return _digest(as_data(manifest))


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(data)).hexdigest()


def _seal(data: Mapping[str, Any]) -> bytes:
    return _canonical({**data, "digest": _digest(data)})


def _canonical(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def parse(data: bytes, file: str) -> Manifest:
    """The manifest in `data`; `file` names it in messages. Raises BundleError."""
    document = _document(data, file)
    root = Node(file, "manifest", document)
    version = root.mapping().get("schema")
    if type(version) is not int:
        raise root.refuse("an object with an integer `schema`")
    if version != SCHEMA:
        age, fix = ("newer", "use a newer rpac") if version > SCHEMA else ("older", "build the bundle again")
        raise BundleError(
            f"{file}: found schema {version}, {age} than this rpac reads; must be schema {SCHEMA}; {fix}, "
            f"or build the bundle with this rpac"
        )
    if not _is_sealed(document, data):
        raise BundleError(
            f"{file}: its digest does not match its content; the file was changed or damaged after it was built; "
            "copy or build the bundle again"
        )
    return _manifest(root)


def _is_sealed(document: Mapping[str, Any], data: bytes) -> bool:
    """Whether `data` is what `render` makes of its own content, digest included."""
    try:
        return data == _seal({key: value for key, value in document.items() if key != "digest"})
    except (ValueError, RecursionError):  # 1e999 is read as an infinity; nesting can be too deep to write
        return False


def _document(data: bytes, file: str) -> Any:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{file}: found {len(data)} bytes that are no JSON ({error}); the file is damaged or cut short; "
            "copy or build the bundle again"
        ) from error


def _manifest(root: Node) -> Manifest:
    fields = root.fields(
        "schema", "digest", "name", "spec_hash", "model", "kv_layout", "limits", "targets", "files",
        optional=("mesh", "server", "steps"),
    )  # fmt: skip
    limits = _limits(fields["limits"])
    files = {path: _file(path, node) for path, node in fields["files"].items().items()}
    model = _attention(fields["model"])
    targets = {name: _target(name, node, limits, model) for name, node in fields["targets"].items().items()}
    for name, target in targets.items():
        for program in target.programs:
            if f"source/{program.source}" not in files:
                raise fields["files"].refuse(f"a list of files with source/{program.source} ({name})")
    if SPEC not in files:
        raise fields["files"].refuse(f"a list of files with {SPEC}")
    mesh = _mesh(fields["mesh"]) if "mesh" in fields else ONE_DEVICE
    layers = {
        name: [one.layer for one in targets.values() if one.name == name]
        for name in {one.name for one in targets.values()}
    }
    steps = parse_steps(fields["steps"], layers, limits, mesh) if "steps" in fields else {}
    if "steps" in fields and not steps:
        raise fields["steps"].refuse("an object with the steps of one target or more, or left out")
    return Manifest(
        name=fields["name"].text(_NAME, "a spec's name"),
        spec_hash=fields["spec_hash"].text(SHA256, "64 hex digits"),
        model=model,
        kv_layout=fields["kv_layout"].choice(layout.TOKEN_AXES),
        limits=limits.of_layers({one.layer: one.model or model for one in targets.values()} or {"": model}),
        targets=targets,
        files=files,
        mesh=mesh,
        server=fields["server"].text(_SERVER, "a server and its version") if "server" in fields else "",
        steps=steps,
    )


def _mesh(node: Node) -> Mesh:
    sizes = node.fields(*AXES, "splits_queries")
    data, kv, copy = (sizes[axis].integer(1, _INT32) for axis in AXES)
    return Mesh(data, kv, copy, sizes["splits_queries"].flag())


def _attention(node: Node) -> Attention:
    optional = {feature.key: feature.values for feature in features_of("model")}
    found = node.fields(
        "q_heads", "kv_heads", "head_dim", "q_dtype", "kv_dtype", "sm_scale", optional=(*optional, "rope_dim")
    )
    return Attention(
        q_heads=found["q_heads"].integer(1, _INT32),
        kv_heads=found["kv_heads"].integer(1, _INT32),
        head_dim=found["head_dim"].integer(1, _INT32),
        q_dtype=found["q_dtype"].choice(layout.BITS),
        kv_dtype=found["kv_dtype"].choice(layout.BITS),
        sm_scale=found["sm_scale"].number(),
        rope_dim=found["rope_dim"].integer(1, _INT32) if "rope_dim" in found else None,
        **{key: _value(values, found[key]) for key, values in optional.items() if key in found},
    )


def _value(values: Values, node: Node) -> Any:
    """What a feature's key says, of the type that the table of features gives it."""
    match values:
        case Flag():
            return node.flag()
        case Count():
            return node.integer(1, _INT32)
        case Number():
            return node.number()
        case Choice(words):
            return node.choice(words)


def _limits(node: Node) -> Limits:
    try:
        return Limits.from_dict(node.mapping())
    except ValueError as error:
        raise BundleError(f"{node.file}: {error}; build the bundle again") from error


def _file(path: str, node: Node) -> Content:
    Node(node.file, "files", path).text(rf"{SPEC}|source/{_PATH}", f"{SPEC} or a plain path under source/")
    return node.content(MAX_FILE_BYTES)


def _target(name: str, node: Node, limits: Limits, model: Attention) -> Target:
    Node(node.file, "targets", name).text(_NAME, "a target's name")
    fields = node.fields("device_kind", "topology", "toolchain", "programs", optional=("layer", "model"))
    layer = fields["layer"].text(_LAYER, "the name of a kind of layers") if "layer" in fields else ""
    if bool(layer) != ("model" in fields) or (layer and not name.endswith(f".{layer}")):
        raise node.refuse("an object with `layer` and `model`, named by its target and its layer, or with neither")
    own = _attention(fields["model"]) if layer else None
    args = _args_of(own or model)
    programs = tuple(_program(program, limits, args) for program in fields["programs"].elements())
    if not programs or len({program.variant for program in programs}) < len(programs):
        raise fields["programs"].refuse("a list with one program or more, each of another kind or token bucket")
    topology = fields["topology"]
    return Target(
        name=name.removesuffix(f".{layer}"),
        device_kind=fields["device_kind"].text(r".+", "a device kind"),
        topology=None if topology.value is None else topology.text(r".+", "null or a topology's name"),
        toolchain=fields["toolchain"].strings(),
        programs=programs,
        layer=layer,
        model=own,
    )


def _args_of(model: Attention) -> tuple[str, ...]:
    """The arguments that every program of a kind of attention takes, by name."""
    if model.rope_dim is not None:
        return LATENT_ARGS
    return ARGS if model.update_cache else READ_ARGS


def _program(node: Node, limits: Limits, args: tuple[str, ...]) -> Program:
    fields = node.fields(
        "kind", "tokens", "source", "plan", "args", "results", "exported", "executable", "canary", "flags", "aliases",
        "memory", "check",
    )  # fmt: skip
    kind = cast(Kind, fields["kind"].choice(KINDS))
    tokens = fields["tokens"].integer(1, _INT32)
    if tokens not in limits.token_buckets:
        raise fields["tokens"].refuse(f"one of the token buckets {list(limits.token_buckets)}")
    executable, canary, check = fields["executable"], fields["canary"], fields["check"]
    return Program(
        variant=Variant(kind, tokens),
        source=fields["source"].text(_PATH, "a plain path under source/"),
        plan=fields["plan"].mapping(),
        args=_arrays(fields["args"], args, tuple(one.name for one in ARGUMENTS)),
        results=_arrays(fields["results"], RESULTS, EXTRA_RESULTS),
        exported=fields["exported"].content(MAX_BLOB_BYTES),
        executable=None if executable.value is None else executable.content(MAX_BLOB_BYTES),
        canary=None if canary.value is None else canary.content(MAX_CANARY_BYTES),
        flags=fields["flags"].strings(),
        aliases=fields["aliases"].mapping(),
        memory=fields["memory"].mapping(),
        check=None if check.value is None else check.mapping(),
    )


def _arrays(node: Node, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> tuple[layout.ArrayDims, ...]:
    arrays = tuple(_array(element) for element in node.elements())
    found = [array.name for array in arrays]
    if found != [*names, *(name for name in optional if name in found)]:
        rest = f" and then any of {', '.join(optional)}" if optional else ""
        raise node.refuse(f"the arrays {', '.join(names)}{rest}, in this order")
    return arrays


def _array(node: Node) -> layout.ArrayDims:
    parts = node.elements()
    if len(parts) != 3:
        raise node.refuse("a name, a dtype and a shape")
    name, dtype, shape = parts
    sizes = tuple(size.integer(1, _INT32) for size in shape.elements())
    return layout.ArrayDims(name.text(r"\w+", "a name"), sizes, dtype.choice(layout.BITS))
