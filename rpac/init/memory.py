"""How many pages fit HBM beside the weights: their bytes from the index, or from a count of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rpac.init.attention import Description
from rpac.init.config import Config, Found
from rpac.init.names import HEAD_DIM, WIDTH

BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
MLP: Final = (
    "intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "ffn_config.ffn_hidden_size",
)  # fmt: skip
EXPERTS: Final = (
    "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_config.moe_num_experts",
)  # fmt: skip
EXPERT_MLP: Final = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size")
SHARED_EXPERTS: Final = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts")
ACTIVATION: Final = ("hidden_act", "hidden_activation", "activation_function", "activation", "mlp_hidden_act")
# These are used with two matrices a layer, others with a third that gates.
UNGATED: Final = frozenset(("gelu", "gelu_new", "gelu_fast", "relu", "relu2"))
QUANTIZED_BYTES: Final = {"fp8": 1.0, "mxfp4": 0.53, "awq": 0.55, "gptq": 0.55}  # of a weight, with its scales


@dataclass(frozen=True)
class Budget:
    """HBM of one device, in bytes. `page_bytes` are those of a page in all layers that have a cache of their own."""

    chip: str
    usable: int
    memory: Found
    weights: int | None
    weights_why: str
    page_size: int
    page_bytes: int
    cached_layers: int
    max_model_len: int
    num_pages: int = 0
    num_pages_why: str = ""

    @property
    def share(self) -> int:
        """What the server may use."""
        return int(self.usable * self.memory.value)

    @property
    def left(self) -> int:
        """What is left for caches."""
        return max(self.share - (self.weights or 0), 0)

    def lines(self) -> Iterator[str]:
        """The budget in words."""
        used = f"{_gib(self.usable)} for programs x {self.memory.value:g} ({self.memory.why}) = {_gib(self.share)}"
        yield f"HBM of a {self.chip} device: {used}"
        weights = "unknown" if self.weights is None else _gib(self.weights)
        yield f"weights: {weights} ({self.weights_why}); left for caches: {_gib(self.left)}"
        cache = self.num_pages * self.page_bytes
        yield (
            f"cache: {self.num_pages} pages x {self.page_size} tokens = {_gib(cache)} in {self.cached_layers} layers "
            f"({self.page_bytes:,} bytes a page); {self.num_pages_why}"
        )
        tokens = self.num_pages * self.page_size
        yield f"it holds {tokens:,} tokens: {tokens / self.max_model_len:.1f} sequences of max_model_len {self.max_model_len}"


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB"


def weights_of(model: Description, index: Found | None, shares: int, q_dtype: str) -> tuple[int | None, str]:
    """Bytes of the weights on one device, of `shares` that share them evenly, and where they come from.

    `q_dtype` is what the server computes in, and so what it keeps weights in that are not quantized.
    """
    over = f" / {shares} devices" if shares > 1 else ""
    method = model.root.word("quantization_config.quant_method")
    if index is not None:
        stored = BYTES.get(model.root.word("torch_dtype", "dtype") or model.config.word("torch_dtype", "dtype"))
        if method or stored is None or stored == BYTES[q_dtype]:
            return -(-index.value // shares), index.why + over
        kept = f", {BYTES[q_dtype]} bytes of each {stored} in {q_dtype}"
        return -(-index.value * BYTES[q_dtype] // stored // shares), index.why + kept + over
    count = parameters(model)
    if count is None:
        return None, "config.json does not say enough to count its parameters, and no index of weights is beside it"
    width = QUANTIZED_BYTES.get(method, BYTES[q_dtype])
    why = f"{width:g} bytes each{f' ({method})' if method in QUANTIZED_BYTES else ''}"
    return int(count * width) // shares, f"{count / 1e9:.2f} billion parameters counted from config.json, {why}{over}"


def parameters(model: Description) -> int | None:
    """The parameters of a decoder, estimated from its config.json: embeddings, attention and MLPs. None where keys miss."""
    config = model.config
    vocab, hidden, layers = config.integer("vocab_size"), config.integer(*WIDTH), model.layers.count
    if vocab is None or hidden is None:
        return None
    width = hidden.value
    tied = config.flag("tie_word_embeddings")
    total = vocab.value * width * (1 if tied is not None and tied.value else 2)
    per_layer = _attention(model, width)
    matrices = 2 if config.word(*ACTIVATION) in UNGATED else 3
    inner = _size(config, MLP)
    dense = matrices * width * (inner or 4 * width)
    experts = config.integer(*EXPERTS, low=0)
    total += layers.value * per_layer
    if experts is None or not experts.value:
        return int(total + layers.value * dense)
    one = 3 * width * (_size(config, EXPERT_MLP) or inner or 4 * width)
    shared = config.integer(*SHARED_EXPERTS, low=0)
    first = config.integer("first_k_dense_replace", low=0, high=layers.value)
    dense_layers = first.value if first else 0
    routed = (layers.value - dense_layers) * one * (experts.value + (shared.value if shared else 0))
    return int(total + routed + dense_layers * dense)


def _size(config: Config, names: tuple[str, ...]) -> int | None:
    """The width of an MLP; the mean of a list with one for each layer."""
    found = config.get(*names)
    if found is not None and isinstance(found.value, list):
        sizes = [size for size in found.value if isinstance(size, int) and 0 < size < 1 << 31]
        return sum(sizes) // len(sizes) if sizes else None
    found = config.integer(*names)
    return None if found is None else int(found.value)


def _attention(model: Description, width: int) -> int:
    """Parameters of one layer's projections."""
    q_heads = model.keys["q_heads"].value
    if not model.is_latent:
        head_dim = model.config.integer(*HEAD_DIM)
        length = head_dim.value if head_dim else model.keys["head_dim"].value
        return int(2 * width * length * (q_heads + model.keys["kv_heads"].value))
    config = model.config
    rank, q_rank = config.integer("kv_lora_rank"), config.integer("q_lora_rank")
    rope, nope, values = (config.integer(name) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    assert rank is not None and rope is not None and nope is not None
    value_dim = values.value if values else nope.value
    queries = q_heads * (nope.value + rope.value)
    q_size = width * queries if q_rank is None else q_rank.value * (width + queries)
    kv_size = width * (rank.value + rope.value) + rank.value * q_heads * (nope.value + value_dim)
    return int(q_size + kv_size + q_heads * value_dim * width)
