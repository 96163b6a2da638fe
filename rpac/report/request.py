"""What a report is asked for, and of which specs and bundles; what nobody said of them is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rpac.bundle import Place, digest, names_bundle, read_texts
from rpac.devices.chip import TPU_TARGETS, is_tpu
from rpac.errors import Problem, SpecError, TargetError
from rpac.plan.tuned import Tuned, TunedTiles
from rpac.predict import Asked, names_apart
from rpac.report.checks import Check
from rpac.report.facts import Subject
from rpac.spec import Spec, load_spec
from rpac.trust import Policy
from rpac.trust.issue import issue


@dataclass(frozen=True)
class Request:
    """What a report is asked for. `targets`: all that each spec or bundle has, where empty. `layers`: how many layers of each
    kind the model has, by `KIND` or, for one of several specs, by `SPEC:KIND`; a kind has no name where it is the only one.
    `prices`: dollars an hour for one chip. `step`: the function of whole steps, empty for the one that each spec or bundle names,
    None where none are predicted. `policy`: whose statements count for the receipts of bundles; None for no receipts.
    """

    targets: tuple[str, ...] = ()
    asked: Asked = field(default_factory=Asked)
    quick: bool = False
    layers: Mapping[str, int] = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    any_compiler: bool = False
    jobs: int = 1
    tuned: Tuned = TunedTiles.of
    command: str = ""
    step: str | None = None
    policy: Policy | None = None


@dataclass(frozen=True)
class Given:
    """Where a spec or a bundle is, with the spec that it is or was built from.

    `step`: the function of whole steps that it names, if any.
    """

    path: Place
    name: str
    spec: Spec
    spec_hash: str
    digest: str | None
    targets: tuple[str, ...]
    step: str = ""

    def layers(self, kind: str, request: Request) -> int | None:
        """How many layers of a kind there are, where the request says it."""
        return request.layers.get(f"{self.spec.name}:{kind}", request.layers.get(kind))


def givens_of(paths: Sequence[Place], request: Request) -> list[Given]:
    """The specs and bundles at some places. A name that occurs twice gets its place, because two bundles of one spec can be
    compared too.

    Raises SpecError or BundleError for what cannot be read, TargetError where there is no TPU target, and SpecError for what
    the request says of nothing in the report: a slip of the pen must not vanish in it.
    """
    givens = [_given(path, request) for path in dict.fromkeys(paths)]
    names = names_apart([one.name for one in givens], [one.path for one in givens])
    apart = [replace(one, name=name) for one, name in zip(givens, names, strict=True)]
    _check_layers(apart, request)
    _check_prices(apart, request)
    _check_checks(apart, request)
    return apart


def _given(path: Place, request: Request) -> Given:
    if names_bundle(path):
        texts = read_texts(path)
        manifest, spec = texts.manifest, texts.spec
        names = tuple(dict.fromkeys(one.name for one in manifest.targets.values()))
        found = digest(manifest)
        name, spec_hash = manifest.name, manifest.spec_hash
        step = next((one.function for one in manifest.steps.values()), "")
    else:
        spec, found = load_spec(path), None
        name, spec_hash, names, step = spec.name, spec.hash, spec.targets, spec.step
    targets = request.targets or tuple(filter(is_tpu, names))
    if not targets:
        raise TargetError(
            f"{path}: found no TPU target, only {', '.join(names)}; must have one of {', '.join(TPU_TARGETS)}, because only "
            "they have schedules to predict from; name one with --target, or add it to the spec's targets"
        )
    return Given(path, name, spec, spec_hash, found, targets, step)


def _check_layers(givens: Sequence[Given], request: Request) -> None:
    kinds = [(given.spec.name, part.layer) for given in givens for part in given.spec.parts]
    known = {name for spec, kind in kinds for name in (kind, f"{spec}:{kind}")}
    forms = list(dict.fromkeys(f"{kind}{kind and '='}N" for _, kind in kinds))
    for name in request.layers:
        if name not in known:
            raise _refused(
                "--layers",
                repr(name) if name else "a number alone",
                f"must be {', '.join(forms)}, as the specs have their layers",
                f"give one of these, or one with a spec's name before it, such as {kinds[0][0]}:{forms[0]}",
            )


def _check_prices(givens: Sequence[Given], request: Request) -> None:
    targets = dict.fromkeys(target for given in givens for target in given.targets)
    for name in request.prices:
        if name not in targets:
            raise _refused("--price", name, f"must be a target of this report: {', '.join(targets)}", "leave it out")


def _check_checks(givens: Sequence[Given], request: Request) -> None:
    hashes = {given.spec_hash: given.name for given in givens}
    for check in request.checks:
        if check.spec_hash not in hashes:
            raise _refused(
                f"--check {check.file}",
                f"a check of the spec with hash {check.spec_hash[:12]}",
                f"must be of {', '.join(f'{one[:12]} ({name})' for one, name in hashes.items())}",
                "run `rpac check` on this spec again",
            )


def _refused(option: str, found: str, allowed: str, fix: str) -> SpecError:
    return SpecError([Problem(option, None, None, "", found, allowed, fix)])


def missing_of(givens: Sequence[Given], request: Request) -> list[str]:
    """What nobody said or measured."""
    found = ["Nothing here was measured on a TPU: all times are predicted from the compiler's schedules."]
    checked = {check.spec_hash for check in request.checks}
    found += [
        f"{given.name}: not checked. Run `rpac check SPEC --json > check.json`, then give `--check check.json`."
        for given in givens
        if given.spec_hash not in checked
    ]
    if request.step is None:
        found += [
            f"{given.name}: the time of its whole steps of {given.step}. Give `--step`."
            for given in givens
            if given.step
        ]
    if request.policy is None:
        found += [
            f"{given.name}: no receipt. Sign the bundle with `rpac sign`, then give `--key FILE` or `--policy FILE`."
            for given in givens
            if given.digest is not None
        ]
    kinds = [(given, part.layer) for given in givens for part in given.spec.parts]
    unknown = dict.fromkeys(kind for given, kind in kinds if given.layers(kind, request) is None)
    if unknown:
        named = " ".join(f"`--layers {name and name + '='}N`" for name in unknown)
        found.append(f"Times of all layers: a spec does not say how many layers the model has. Give {named}.")
    without = [t for t in dict.fromkeys(t for given in givens for t in given.targets) if t not in request.prices]
    if without:
        named = " ".join(f"`--price {target}=DOLLARS`" for target in without)
        found.append(f"Cost on {', '.join(without)}: no price was given. Give {named}, an hour for one chip.")
    return found


def subject_of(given: Given, request: Request) -> Subject:
    """What the page says of a spec or a bundle before anything is predicted. Raises BundleError for one that is damaged."""
    model, devices = given.spec.model, given.spec.mesh.devices
    spread = f", {devices} devices" if devices > 1 else ""
    return Subject(
        given.name,
        str(given.path),
        "spec" if given.digest is None else "bundle",
        given.spec_hash,
        given.digest,
        f"{model.q_heads} query heads, {model.kv_heads} KV heads of {model.head_dim} on a device, {model.kv_dtype} cache "
        f"({given.spec.serving.kv_layout}), pages of {given.spec.serving.page_size}{spread}",
        next((check for check in request.checks if check.spec_hash == given.spec_hash), None),
        None if given.digest is None or request.policy is None else issue(given.path, request.policy),
    )
