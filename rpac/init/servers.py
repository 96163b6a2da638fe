"""What two servers do with their flags on TPU, and without them.

vLLM: tpu-inference 0.32.0 (`platforms/tpu_platform.py`, `layers/vllm/backends/flash_attn.py`) and vLLM's
`EngineArgs.get_batch_defaults` for an API server whose device it does not know. SGLang: sglang-jax's `ServerArgs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rpac.contract.attention import DTYPES, QUANTIZED
from rpac.contract.features import MAX_MODEL_LEN
from rpac.init.attention import Description
from rpac.init.config import Found, refuse, shown
from rpac.spec.parse import MAX_DEVICES, MAX_SEQS, MAX_TOKENS, PAGE_SIZES

DEFAULT_LENGTH: Final = 2048  # vLLM's, where config.json gives none
FLAGS: Final = "the command line"  # in place of a file's name

# The sizes of a page table in SMEM that both servers allow: int32 entries in half of 1 MiB.
TABLE_ENTRIES: Final = (1 << 20) // 2 // 4


@dataclass(frozen=True)
class Flag:
    """A server's own flag. `key` is what rpac calls it; `most` its largest value."""

    key: str
    names: tuple[str, ...]
    type: type
    most: float
    help: str

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Server:
    """A server. `kv_dtypes`: its words for a cache's dtype. `memory`: the share of HBM that it uses by default."""

    name: str
    title: str
    flags: tuple[Flag, ...]
    kv_dtypes: Mapping[str, str]
    memory: float
    adapter: str

    def flag(self, key: str) -> Flag:
        return next(flag for flag in self.flags if flag.key == key)


def _flags(*rows: tuple[str, tuple[str, ...], type, float, str]) -> tuple[Flag, ...]:
    return tuple(Flag(*row) for row in rows)


VLLM: Final = Server(
    "vllm",
    "vLLM",
    _flags(
        ("max_model_len", ("--max-model-len",), int, MAX_MODEL_LEN, "Longest sequence, in tokens."),
        ("page_size", ("--block-size",), int, 1 << 20, "Tokens of a page."),
        ("max_num_seqs", ("--max-num-seqs",), int, MAX_SEQS, "Most sequences in a batch."),
        ("max_num_tokens", ("--max-num-batched-tokens",), int, MAX_TOKENS, "Most tokens in a batch."),
        ("tensor", ("--tensor-parallel-size", "-tp"), int, MAX_DEVICES, "Devices that share the heads."),
        ("data", ("--data-parallel-size", "-dp"), int, MAX_DEVICES, "Replicas."),
        ("memory", ("--gpu-memory-utilization",), float, 1.0, "Share of HBM to use."),
        ("num_pages", ("--num-gpu-blocks-override",), int, 1 << 31, "Pages of the cache."),
    ),
    {"bfloat16": "bfloat16", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"},
    0.9,
    "rpac.adapters.tpu_inference",
)
SGLANG: Final = Server(
    "sglang",
    "SGLang",
    _flags(
        ("max_model_len", ("--context-length",), int, MAX_MODEL_LEN, "Longest sequence, in tokens."),
        ("page_size", ("--page-size",), int, 1 << 20, "Tokens of a page."),
        ("max_num_seqs", ("--max-running-requests",), int, MAX_SEQS, "Most sequences in a batch."),
        ("max_num_tokens", ("--chunked-prefill-size",), int, MAX_TOKENS, "Most tokens in a batch."),
        ("tensor", ("--tp-size", "--tp"), int, MAX_DEVICES, "Devices that share the heads."),
        ("data", ("--dp-size", "--dp"), int, MAX_DEVICES, "Replicas."),
        ("memory", ("--mem-fraction-static",), float, 1.0, "Share of HBM for weights and cache."),
        ("num_tokens", ("--max-total-tokens",), int, 1 << 40, "Tokens of the cache."),
    ),
    {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "bf16": "bfloat16"},
    0.88,
    "rpac.adapters.sglang_jax",
)
SERVERS: Final[Mapping[str, Server]] = {server.name: server for server in (VLLM, SGLANG)}
# The model's dtype, as both servers name it. float16 becomes bfloat16, because rpac has no kernels for it.
DTYPE_WORDS: Final = {
    "bfloat16": "bfloat16", "float16": "bfloat16", "half": "bfloat16", "float32": "float32", "float": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a user asked for. `given` are the values of the server's flags, by `Flag.key`."""

    server: Server
    chip: str
    devices: int | None
    given: Mapping[str, Any]
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"

    def value(self, key: str) -> Found | None:
        """The value of a flag, and how it was written."""
        value = self.given.get(key)
        return None if value is None else Found(value, f"{self.server.flag(key).name} {value}")

    def refuse(self, key: str, allowed: str, fix: str) -> None:
        """Raises ModelError for the value of a flag."""
        refuse(FLAGS, self.server.flag(key).name, str(self.given[key]), allowed, fix)


@dataclass(frozen=True)
class Wanted:
    """How the server would serve a model, before rpac looks whether it plans. `fixed`: keys that a flag gave.

    `num_tokens` are those of the cache of a layer, None for as many as fit. `memory` is the share of HBM to use.
    """

    max_model_len: Found
    max_num_tokens: Found
    max_num_seqs: Found
    page_size: Found
    tensor: Found
    data: Found
    memory: Found
    num_pages: Found | None
    num_tokens: Found | None
    q_dtype: Found
    kv_dtype: Found
    fixed: frozenset[str]


def wanted(request: Request, model: Description) -> Wanted:
    """The server's settings for a model. Raises ModelError for flags that exclude each other or that rpac cannot do."""
    length = _length(request, model)
    tokens = _tokens(request, length.value)
    seqs = _seqs(request, length.value, tokens.value)
    tensor, data = _devices(request, model)
    q_dtype = _q_dtype(request, model)
    default = f"{request.server.title}'s default"
    return Wanted(
        length,
        tokens,
        seqs,
        _page_size(request, model, length.value, seqs.value),
        tensor,
        data,
        request.value("memory") or Found(request.server.memory, default),
        request.value("num_pages"),
        request.value("num_tokens"),
        q_dtype,
        _kv_dtype(request, model, q_dtype),
        frozenset(request.given),
    )


def _length(request: Request, model: Description) -> Found:
    given = request.value("max_model_len")
    if given is not None:
        if model.length is not None and given.value > model.length.value:
            allowed = f"must be at most {model.length.value}, the longest sequence of the model ({model.length.why})"
            request.refuse("max_model_len", allowed, "lower it, or change config.json if its positions reach further")
        return given
    if model.length is None:
        return Found(DEFAULT_LENGTH, f"{request.server.title}'s default where config.json gives no length")
    if model.length.value > MAX_MODEL_LEN:
        return Found(MAX_MODEL_LEN, f"{model.length.why}; rpac has {MAX_MODEL_LEN} at most")
    return model.length


def _tokens(request: Request, length: int) -> Found:
    given = request.value("max_num_tokens")
    if given is not None and given.value > 0:
        return given
    if request.server is SGLANG:
        if given is not None:
            return Found(16384, f"{given.why}: no chunks; SGLang's default of --max-prefill-tokens")
        return Found(4096, "SGLang's default of --chunked-prefill-size on TPU")
    return Found(2048, "vLLM's default of --max-num-batched-tokens for an API server on TPU")


def _seqs(request: Request, length: int, tokens: int) -> Found:
    given = request.value("max_num_seqs")
    if given is not None:
        if given.value > tokens:
            flag = request.server.flag("max_num_tokens").name
            allowed = f"must be at most the tokens of a batch ({flag} {tokens}): decode takes a token of every sequence"
            request.refuse("max_num_seqs", allowed, f"lower it, or raise {flag}")
        return given
    if request.server is VLLM:
        return Found(min(256, tokens), "vLLM's default of --max-num-seqs for an API server")
    page = request.given.get("page_size") or DEFAULT_PAGE
    most = max(TABLE_ENTRIES // -(-length // page), 1)
    why = f"SGLang's limit for a page table of {length} tokens in SMEM"
    return Found(min(most, tokens, MAX_SEQS), why)


DEFAULT_PAGE: Final = 128  # where a server's own default is none that rpac has


def _page_size(request: Request, model: Description, length: int, seqs: int) -> Found:
    given = request.value("page_size")
    if given is not None:
        if given.value not in PAGE_SIZES:
            near = min(PAGE_SIZES, key=lambda size: abs(size - given.value))
            request.refuse("page_size", f"must be one of {', '.join(map(str, PAGE_SIZES))}", f"write {near}")
        return given
    if request.server is SGLANG:
        return Found(DEFAULT_PAGE, "SGLang's default is 1, and rpac has 8 or more: start it with this --page-size")
    if model.is_latent:
        return Found(
            PAGE_SIZES[-1], "vLLM's default for MLA on TPU is 1024, more than rpac has: start it with this --block-size"
        )
    page = 16 if length > 8192 else min(max(_power_of_two(length) // 16, 16), 256)
    least = _power_of_two(-(-length // max(TABLE_ENTRIES // seqs, 1)))
    return Found(min(max(page, least), PAGE_SIZES[-1]), "vLLM's default of --block-size on TPU, from the lengths above")


def _power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()


def _devices(request: Request, model: Description) -> tuple[Found, Found]:
    """Devices that share the heads, and replicas."""
    tensor, data, devices = request.value("tensor"), request.value("data"), request.devices
    if tensor is not None and data is not None and tensor.value * data.value > MAX_DEVICES:
        request.refuse("data", f"must be at most {MAX_DEVICES} devices with {tensor.why}", "lower one of them")
    if devices is None:
        none = Found(1, "one device")
        return tensor or none, data or none
    asked = f"--devices {devices}"
    if tensor is not None and data is not None:
        if tensor.value * data.value != devices:
            _refuse_devices(request, devices, f"must be {tensor.value * data.value}: {tensor.why} times {data.why}")
        return tensor, data
    if tensor is not None or data is not None:
        one = tensor or data
        assert one is not None
        if devices % one.value:
            _refuse_devices(request, devices, f"must be a multiple of {one.value} ({one.why})")
        rest = Found(devices // one.value, f"{asked} / {one.value}")
        return (tensor, rest) if tensor is not None else (rest, one)
    if model.is_latent:  # as tpu-inference's enable_dp_attention
        return Found(1, asked), Found(
            devices, f"{asked}: each device serves its own sequences, because MLA has no KV heads to split"
        )
    return Found(devices, asked), Found(1, asked)


def _refuse_devices(request: Request, devices: int, allowed: str) -> None:
    refuse(FLAGS, "--devices", str(devices), allowed, "leave --devices out, or correct one of them")


def _q_dtype(request: Request, model: Description) -> Found:
    if request.dtype != "auto":
        dtype = DTYPE_WORDS[request.dtype]
        other = "; rpac has no kernels for float16" if request.dtype in ("float16", "half") else ""
        return Found(dtype, f"--dtype {request.dtype}{other}")
    names = ("torch_dtype", "dtype")
    found = model.config.get(*names) or model.root.get(*names)
    if found is None or found.value == DTYPES[0]:
        return Found(DTYPES[0], "no dtype in config.json" if found is None else found.why)
    return Found(DTYPES[0], f"{found.why}, in bfloat16 on a TPU unless --dtype says otherwise")


def _kv_dtype(request: Request, model: Description, q_dtype: Found) -> Found:
    word = request.kv_cache_dtype
    server = request.server
    if word == "auto":
        return Found(q_dtype.value, f"{server.title}'s default of --kv-cache-dtype, auto: as the model")
    if word not in server.kv_dtypes:
        allowed = f"must be auto or one of {', '.join(server.kv_dtypes)} with --like {server.name}"
        refuse(FLAGS, "--kv-cache-dtype", shown(word), allowed, "write one of them")
    if model.is_latent and server.kv_dtypes[word] in QUANTIZED:
        allowed = "must be auto with latent attention: rpac's kernels store its cache as it is"
        refuse(FLAGS, "--kv-cache-dtype", word, allowed, "leave it out")
    if server is VLLM and word == "fp8" and request.chip == "v6e":
        return Found("float8_e5m2", "--kv-cache-dtype fp8, which vLLM takes as fp8_e5m2 on v6e")
    return Found(server.kv_dtypes[word], f"--kv-cache-dtype {word}")
