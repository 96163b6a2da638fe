"""The rules of the spec format: which keys there are, what each may be, and which combinations are impossible."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import replace
from pathlib import Path

from rpac.contract.attention import (
    ATTENTIONS,
    DTYPES,
    KV_DTYPES,
    KV_LAYOUTS,
    LATENT_LAYOUT,
    QUANTIZED,
    Attention,
    Serving,
)
from rpac.contract.features import MAX_MODEL_LEN, features_of
from rpac.contract.mesh import ONE_DEVICE, Mesh
from rpac.contract.step import REFERENCE
from rpac.errors import SpecError
from rpac.spec.drafts import check_drafts, check_kinds, check_room, check_rows
from rpac.spec.features import read_features
from rpac.spec.latent import LATENT_KEYS, check_device, read_latent
from rpac.spec.mask import check_mask, check_mask_lengths
from rpac.spec.model import NO_TARGETS, TARGETS, Spec, default_token_buckets
from rpac.spec.nodes import MAX_SIZE, Report, Section, compose

ROOT_KEYS = ("name", "model", "layers", "serving", "parallel", "step", "targets")
MODEL_KEYS = (
    "attention",
    "q_heads",
    "kv_heads",
    "head_dim",
    "q_dtype",
    "kv_dtype",
    "sm_scale",
    *(feature.key for feature in features_of("model")),
    *LATENT_KEYS,
)
SERVING_KEYS = (
    "page_size",
    "max_model_len",
    "max_num_tokens",
    "token_buckets",
    "max_num_seqs",
    "prefill_chunk",
    "context_lens",
    "num_pages",
    "kv_layout",
    *(feature.key for feature in features_of("serving")),
)
PARALLEL_KEYS = ("tensor", "data")
HOMES = {
    **dict.fromkeys(ROOT_KEYS, ""),
    **dict.fromkeys(MODEL_KEYS, "model"),
    **dict.fromkeys(SERVING_KEYS, "serving"),
    **dict.fromkeys(PARALLEL_KEYS, "parallel"),
}
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
PAGE_SIZES = (8, 16, 32, 64, 128, 256, 512)
# Of a cache whose tokens lie along sublanes: they share a register of 8 words with others of their head.
LEAST_APART = {"float32": 8, "bfloat16": 16, **dict.fromkeys(QUANTIZED, 32)}
PORTABLE = ("cpu", "gpu")  # targets without a TPU kernel
MAX_BYTES_DIM = 128  # head_dim of an 8-bit cache whose tokens hold K and V side by side
NAME = r"[a-z0-9][a-z0-9.-]{0,63}"
LAYER = r"[a-z0-9][a-z0-9-]{0,31}"

MAX_HEADS = 1024
MAX_DEVICES = 32  # of a topology that libtpu describes for every target
MAX_GROUP = 16
MAX_TOKENS = 1 << 20
MAX_SEQS = 4096
MAX_BUCKETS = 64  # each is a program of every kind on every target
MAX_LENGTHS = 64
MAX_LAYERS = 32  # kinds of layers
MAX_SLOTS = 2**31 - 1
SM_SCALES = (1e-6, 1e6)


def load_spec(path: str | os.PathLike[str]) -> Spec:
    """The spec in the file at `path`, or on standard input where `path` is "-".

    Raises SpecError with every problem of the file, or why it cannot be read.
    """
    is_stdin = os.fspath(path) == "-"
    report = Report("<stdin>" if is_stdin else os.fspath(path))
    try:
        data = _stdin() if is_stdin else _head(Path(path))
    except OSError as error:
        found = f"a file that cannot be read ({error.strerror})"
        report.at(None, None, "", found, "must be a readable YAML file", "check the path")
        raise SpecError(report.problems) from error
    if len(data) > MAX_SIZE:
        report.too_large()
        raise SpecError(report.problems)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        report.at(line, column, "", f"byte {data[error.start]:#04x}", "must be UTF-8", "save the file as UTF-8")
        raise SpecError(report.problems) from error
    return parse_spec(text, report.file)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_SIZE + 1)


@functools.cache
def _stdin() -> bytes:
    """Standard input, which can be read only once."""
    return sys.stdin.buffer.read(MAX_SIZE + 1)


def parse_spec(text: str, file: str) -> Spec:
    """The spec written in `text`; `file` names it in messages. Raises SpecError with every problem found."""
    report = Report(file)
    spec = _read(text, report)
    if spec is None or report.problems:
        raise SpecError(report.in_order())
    return spec


def _read(text: str, report: Report) -> Spec | None:
    node = compose(text, report)
    if node is None:
        return None
    root = Section(report, node, "", ROOT_KEYS, HOMES)
    allowed = "must be lower-case letters, digits, dots and dashes, 64 at most, a letter or digit first"
    name = root.text("name", NAME, allowed, "my-model")
    model_section = root.section("model", MODEL_KEYS, HOMES)
    serving_section = root.section("serving", SERVING_KEYS, HOMES)
    targets = root.words("targets", TARGETS, "[tpu7x, cpu]", NO_TARGETS)
    step = root.text("step", REFERENCE, "must be package.module:function", "my_model:step") if root.has("step") else ""
    model = None if model_section is None else _model(model_section)
    serving = None if serving_section is None else _serving(serving_section)
    if name is None or model is None or serving is None or targets is None or step is None:
        return None
    assert model_section is not None and serving_section is not None
    mesh = _mesh(root, model)
    serving = _with_layout(serving_section, model, serving)
    kinds = {"": (model_section, model), **_layers(root, model_section, model)}
    of_layers = list(kinds.values())[len(kinds) > 1 :]  # the first is no layer itself where others are named
    check_kinds(serving_section, serving, [kind for _, kind in of_layers])
    for section, kind in of_layers:
        check_mask_lengths(section, kind, serving)
        _check_apart(serving_section, kind, serving)
        copies = kind.quantized and kind.head_dim > MAX_BYTES_DIM and serving.kv_layout != "separate"
        if copies and not set(targets) <= set(PORTABLE):
            _refuse_copies(serving_section, kind)
    if mesh is None:
        return None
    parts = {
        layer: replace(kind, q_heads=kind.q_heads // mesh.query_parts, kv_heads=kind.kv_heads // mesh.kv)
        for layer, (_, kind) in kinds.items()
    }
    for layer, part in parts.items():
        if part.rope_dim is not None:
            check_device(kinds[layer][0], part.q_heads)
        elif part.group > MAX_GROUP and (layer or len(parts) == 1):
            _refuse_group(*kinds[layer], part, mesh)
    model = parts.pop("")
    return Spec(
        name, model, serving, targets, source=text, file=report.file, mesh=mesh, layers=tuple(parts.items()), step=step
    )


def _layers(root: Section, base: Section, model: Attention) -> dict[str, tuple[Section, Attention]]:
    """The kinds of layers by name, each with the keys of `model` that it does not have itself."""
    if not root.has("layers"):
        return {}
    allowed = "must be lower-case letters, digits and dashes, 32 at most, a letter or digit first, each name once"
    found = {}
    for name, section in root.sections("layers", LAYER, allowed, MODEL_KEYS, HOMES, MAX_LAYERS).items():
        kind = _model(section.over(base))
        if kind is not None:
            found[name] = section, kind
            if root.has("parallel") and (kind.q_heads, kind.kv_heads) != (model.q_heads, model.kv_heads):
                heads = f"must be those of model ({model.q_heads} and {model.kv_heads}) beside parallel"
                section.clash("kv_heads" if section.has("kv_heads") else "q_heads", heads, "build a bundle for each")
    return found


def _mesh(root: Section, model: Attention) -> Mesh | None:
    """How the devices of `parallel` share the model's heads; one device without it."""
    if not root.has("parallel"):
        return ONE_DEVICE
    section = root.section("parallel", PARALLEL_KEYS, HOMES)
    if section is None:
        return None
    tensor, data = (section.integer(key, 1, MAX_DEVICES, 8) if section.has(key) else 1 for key in PARALLEL_KEYS)
    if tensor is None or data is None:
        return None
    if tensor * data > MAX_DEVICES:
        allowed = f"must be at most {MAX_DEVICES} devices with tensor ({tensor})"
        section.clash("data", allowed, f"write {MAX_DEVICES // tensor} or less: replicas need not share a program")
        return None
    return Mesh.of(model.q_heads, model.kv_heads, tensor, data)


def _model(section: Section) -> Attention | None:
    if section.has("attention"):
        attention = section.choice("attention", ATTENTIONS)
        if attention != ATTENTIONS[0]:
            return read_latent(section, SM_SCALES, MAX_HEADS) if attention else None
    for key in LATENT_KEYS:
        if section.has(key):
            section.clash(key, "must be left out without attention latent", "remove it, or write `attention: latent`")
    q_heads = section.integer("q_heads", 1, MAX_HEADS, 32)
    kv_heads = section.integer("kv_heads", 1, MAX_HEADS, 8)
    head_dim = section.integer("head_dim", 1, MAX_SLOTS, 128)
    q_dtype = section.choice("q_dtype", DTYPES)
    kv_dtype = section.choice("kv_dtype", KV_DTYPES)
    sm_scale = section.number("sm_scale", *SM_SCALES) if section.has("sm_scale") else None
    features = read_features(section, "model")
    check_mask(section, features)

    if q_heads is not None and kv_heads is not None and q_heads % kv_heads:
        near = max(1, round(q_heads / kv_heads)) * kv_heads
        section.clash("q_heads", f"must be a multiple of kv_heads ({kv_heads})", f"write {near} or change kv_heads")
    if head_dim is not None and head_dim not in HEAD_DIMS:
        section.clash("head_dim", f"must be {_either(HEAD_DIMS)}", _padded(head_dim, section.has("sm_scale")))
    if features["update_cache"] is False and features["quantize"] == "kernel":
        allowed = "must be left out with update_cache false: there is nothing to quantize"
        section.clash("quantize", allowed, "remove one of the two")
    if kv_dtype not in QUANTIZED:
        if q_dtype is not None and kv_dtype is not None and q_dtype != kv_dtype:
            allowed = f"must equal q_dtype ({q_dtype}) or be one of {', '.join(QUANTIZED)}"
            section.clash("kv_dtype", allowed, f"write {q_dtype}")
        for key in ("kv_scale", "quantize"):
            if kv_dtype is not None and section.has(key):
                allowed = f"must be left out with kv_dtype {kv_dtype}, which is stored unchanged"
                section.clash(key, allowed, f"remove it, or write `kv_dtype: {QUANTIZED[0]}`")

    if q_heads is None or kv_heads is None or head_dim is None or q_dtype is None or kv_dtype is None:
        return None
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    return Attention(q_heads, kv_heads, head_dim, q_dtype, kv_dtype, scale, **features)


def _serving(section: Section) -> Serving | None:
    page_size = section.integer("page_size", 1, PAGE_SIZES[-1], 128)
    max_model_len = section.integer("max_model_len", 1, MAX_MODEL_LEN, 8192)
    max_num_tokens = section.integer("max_num_tokens", 1, MAX_TOKENS, 2048)
    example = f"[{max_num_tokens or 2048}]"
    buckets = (
        section.integers("token_buckets", 1, MAX_TOKENS, example, MAX_BUCKETS) if section.has("token_buckets") else None
    )
    max_num_seqs = section.integer("max_num_seqs", 1, MAX_SEQS, 64)
    prefill_chunk = section.integer("prefill_chunk", 1, MAX_TOKENS, 512)
    context_lens = section.integers("context_lens", 1, MAX_MODEL_LEN, f"[{max_model_len or 4096}]", MAX_LENGTHS)
    num_pages = section.integer("num_pages", 1, MAX_SLOTS, 1024) if section.has("num_pages") else None
    kv_layout = section.choice("kv_layout", KV_LAYOUTS) if section.has("kv_layout") else KV_LAYOUTS[0]
    features = read_features(section, "serving")
    decode_len = features["decode_len"]
    check_drafts(section, features)

    if max_num_tokens is not None:
        _check_tokens(section, max_num_tokens, buckets, max_num_seqs, prefill_chunk, decode_len)
    check_room(section, decode_len, buckets, max_model_len)
    if max_model_len is not None:
        _check_lengths(section, max_model_len, prefill_chunk, context_lens)
    if page_size is not None and page_size not in PAGE_SIZES:
        section.clash("page_size", f"must be {_either(PAGE_SIZES)}", f"write {_nearest(page_size, PAGE_SIZES)}")
    elif page_size is not None and max_model_len is not None:
        if max_model_len % page_size:
            near = -(-max_model_len // page_size) * page_size
            section.clash("max_model_len", f"must be a multiple of page_size ({page_size})", f"write {near}")
        else:
            num_pages = _check_pages(section, page_size, max_model_len // page_size, max_num_seqs, num_pages)

    if page_size is None or max_model_len is None or max_num_tokens is None or max_num_seqs is None:
        return None
    if prefill_chunk is None or context_lens is None or num_pages is None or kv_layout is None:
        return None
    buckets = buckets or default_token_buckets(max_num_tokens)
    return Serving(
        page_size,
        max_model_len,
        max_num_tokens,
        buckets,
        max_num_seqs,
        prefill_chunk,
        context_lens,
        num_pages,
        kv_layout,
        **features,
    )


def _refuse_group(section: Section, model: Attention, part: Attention, mesh: Mesh) -> None:
    """Reports more query heads for each KV head than a kernel takes: on one device, as `part` has them."""
    most = MAX_GROUP * model.kv_heads
    if mesh.query_parts == 1:
        allowed = f"must be at most {MAX_GROUP} times kv_heads ({model.kv_heads})"
        section.clash("q_heads", allowed, f"write {most} or less, or change kv_heads")
        return
    allowed = (
        f"must leave each device at most {MAX_GROUP} times its KV heads; `parallel` leaves {part.q_heads} query heads and "
        f"{part.kv_heads} KV heads there"
    )
    section.clash("q_heads", allowed, f"write {most} or less, or change kv_heads or parallel.tensor")


def _refuse_copies(section: Section, model: Attention) -> None:
    found = "interleaved" if section.has("kv_layout") else "interleaved, its default"
    allowed = (
        f"must be separate with kv_dtype {model.kv_dtype} and head_dim above {MAX_BYTES_DIM} on a TPU: the compiler would copy "
        "an 8-bit cache, to view each row of two registers as one row"
    )
    section.clash("kv_layout", allowed, "write `kv_layout: separate`", found)


def _check_apart(section: Section, model: Attention, serving: Serving) -> None:
    least = LEAST_APART[model.kv_dtype]
    latent = model.rope_dim is not None
    if (serving.kv_layout == "separate" or latent) and serving.page_size < least:
        what = "attention latent" if latent else "kv_layout separate"
        allowed = (
            f"must be at least {least} with {what} and kv_dtype {model.kv_dtype}: that many tokens share a register"
        )
        section.clash(
            "page_size", allowed, f"write {least}" if latent else f"write {least}, or `kv_layout: interleaved`"
        )


def _with_layout(section: Section, model: Attention, serving: Serving) -> Serving:
    """The serving of a model whose attention decides the cache's layout."""
    if model.rope_dim is None:
        return serving
    if section.has("kv_layout"):
        allowed = (
            "must be left out with attention latent: keys and values share one vector, so there is only one layout"
        )
        section.clash("kv_layout", allowed, "remove it")
    if serving.log_sum_exp:
        section.clash("log_sum_exp", "must be false with attention latent: its kernels do not return it", "remove it")
    return replace(serving, kv_layout=LATENT_LAYOUT)


def _check_tokens(
    section: Section,
    max_num_tokens: int,
    buckets: tuple[int, ...] | None,
    max_num_seqs: int | None,
    prefill_chunk: int | None,
    decode_len: int,
) -> None:
    if buckets is not None and buckets[-1] != max_num_tokens:
        allowed = f"must end in max_num_tokens ({max_num_tokens})"
        below = [bucket for bucket in buckets if bucket < max_num_tokens]
        section.clash("token_buckets", allowed, f"write {[*below, max_num_tokens]}", f"{buckets[-1]} at its end")
    if max_num_seqs is not None:
        check_rows(section, max_num_tokens, max_num_seqs, decode_len)
    if prefill_chunk is not None and prefill_chunk > max_num_tokens:
        allowed = f"must be at most max_num_tokens ({max_num_tokens})"
        section.clash("prefill_chunk", allowed, f"write {max_num_tokens} or raise max_num_tokens")


def _check_lengths(
    section: Section, max_model_len: int, prefill_chunk: int | None, context_lens: tuple[int, ...] | None
) -> None:
    allowed = f"must be at most max_model_len ({max_model_len})"
    if prefill_chunk is not None and prefill_chunk > max_model_len:
        section.clash("prefill_chunk", allowed, f"write {max_model_len} or raise max_model_len")
    if context_lens is not None and context_lens[-1] > max_model_len:
        fix = "remove what is above it, or raise max_model_len"
        section.clash("context_lens", allowed, fix, f"{context_lens[-1]} at its end")


def _check_pages(
    section: Section, page_size: int, pages_per_seq: int, max_num_seqs: int | None, num_pages: int | None
) -> int | None:
    """The pages of one layer's cache, where they are known."""
    if num_pages is not None:
        if num_pages < pages_per_seq:
            allowed = f"must be at least {pages_per_seq}, the pages of one sequence of max_model_len"
            section.clash("num_pages", allowed, f"write {pages_per_seq} or lower max_model_len")
    elif max_num_seqs is not None and not section.has("num_pages"):
        num_pages = max_num_seqs * pages_per_seq
    if num_pages is not None and num_pages * page_size > MAX_SLOTS:
        most = MAX_SLOTS // page_size
        allowed = f"must be at most {most}, so that int32 can count the cache's tokens"
        found = str(num_pages) if section.has("num_pages") else f"{num_pages}, its default"
        section.clash("num_pages", allowed, f"write `num_pages: {most}` or less", found)
    return num_pages


def _padded(head_dim: int, scaled: bool) -> str:
    """What to do about a head_dim that no kernel has: zeros change no score, if the scale stays that of the model."""
    padded = next((size for size in HEAD_DIMS if size > head_dim), None)
    if padded is None:
        return "serve this model without rpac, which has no kernels for longer heads"
    scale = "" if scaled else f" and `sm_scale: {head_dim**-0.5!r}`"
    return f"write {padded}{scale}, and pad queries, keys and values with zeros"


def _either(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


def _nearest(value: int, values: tuple[int, ...]) -> int:
    return min(values, key=lambda allowed: abs(allowed - value))
