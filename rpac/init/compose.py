"""Composes the spec of a model as a server would run it, with sizes that may still change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rpac.contract.attention import QUANTIZED
from rpac.contract.mesh import Mesh
from rpac.init.attention import Description
from rpac.init.config import Found
from rpac.init.layers import Kind
from rpac.init.servers import Request, Wanted
from rpac.init.share import mesh_notes, share_notes, share_of
from rpac.init.write import Document, Layer
from rpac.spec.parse import MAX_BYTES_DIM

CHUNK_STEP: Final = 16  # a prefill chunk on TPU is a multiple of it
PREFILL_CHUNK: Final = 512
LATENT_CHUNK: Final = 256  # with 128 heads a longer one fits no VMEM
CONTEXTS: Final = ((8, 4096), (2, 16384))  # parts of max_model_len, and the longest of each
MASKS: Final = ("sliding_window", "attention_chunk")
SHAPES: Final = ("q_heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Sizes:
    """What is tried: a page size, sequences, and at last the pages of the cache."""

    page_size: Found
    max_num_seqs: Found
    num_pages: Found | None = None


@dataclass(frozen=True)
class Composer:
    """Makes specs of one model for one request. `command` is what a user wrote, for the first comment."""

    model: Description
    request: Request
    settings: Wanted
    name: Found
    command: str

    def document(self, sizes: Sizes, head: tuple[str, ...] = ()) -> Document:
        """The spec with some sizes. Without `num_pages` the cache holds one sequence, which shows whether it plans."""
        length = self.length(sizes.page_size.value)
        kinds = self.kinds(length.value)
        model = self._model()
        if list(kinds) == [""]:
            model |= self._own(kinds.pop("")[0], length.value)
        why = self.model.layers.why
        layers = {
            name: Layer(self._own(kind, length.value), f"{count} layers; {why}")
            for name, (kind, count) in kinds.items()
        }
        one = Found(length.value // sizes.page_size.value, "the pages of one sequence")
        serving = {
            "page_size": sizes.page_size,
            **({} if self.model.is_latent else {"kv_layout": self._layout()}),
            **self._batches(sizes, length),
            "num_pages": sizes.num_pages or one,
        }
        chip = self.request.chip
        targets = Found([chip, "cpu"], f"--chip {chip}; cpu, so that the bundle runs on a machine without one")
        return Document(head, self.name, model, layers, serving, self._parallel(), targets)

    def length(self, page: int) -> Found:
        """max_model_len in whole pages; with cross-attention the encoder's tokens fit too."""
        length = self.settings.max_model_len
        encoder = self.model.encoder_length
        if encoder is not None and encoder.value > length.value:
            why = f"{encoder.why}, which cross-attention sees; the decoder's own: {length.value}"
            length = Found(encoder.value, why)
        whole = -(-length.value // page) * page
        return length if whole == length.value else Found(whole, f"{length.why}, in whole pages")

    def kinds(self, length: int) -> dict[str, tuple[Kind, int]]:
        """The kinds that differ at this length, by the name that the spec gives them, and how many layers are of each."""
        merged: dict[tuple[tuple[str, object], ...], tuple[Kind, int]] = {}
        for kind in self.model.kinds:
            key = tuple(sorted((name, one.value) for name, one in self._own(kind, length).items()))
            first, count = merged.get(key, (kind, 0))
            merged[key] = first, count + kind.count
        if len(merged) == 1:
            return {"": next(iter(merged.values()))}
        return {kind.name: (kind, count) for kind, count in merged.values()}

    def notes(self, sizes: Sizes) -> tuple[str, ...]:
        """What a user has to know beside the lines."""
        length = self.length(sizes.page_size.value).value
        notes = list(self.model.notes)
        for kind in self.model.kinds:
            for key in MASKS:
                own = kind.own.get(key)
                if own is not None and own.value >= length:
                    notes.append(f"{own.why}: it hides nothing at max_model_len {length}, so the spec has none.")
        adapter = self.request.server.adapter
        if self.request.per_device:
            notes += share_notes(self.model, self.settings, adapter)
        else:
            notes += mesh_notes(self.settings, self.request.server.title, adapter)
        notes.append(f"Start {self.request.server.title} with {' '.join(self._flags(sizes, length))}.")
        return tuple(dict.fromkeys(notes))

    def _model(self) -> dict[str, Found]:
        """The keys of `model`, the dtypes behind the lengths."""
        kv_dtype = self.settings.kv_dtype
        dtypes = {"q_dtype": self.settings.q_dtype, "kv_dtype": kv_dtype}
        if kv_dtype.value in QUANTIZED:
            dtypes["kv_scale"] = Found("tensor", f"{self.request.server.title} has one k_scale and one v_scale a layer")
        keys: dict[str, Found] = {}
        for name, found in self._of_device(self.model.keys).items():
            keys[name] = found
            if name == ("rope_dim" if self.model.is_latent else "head_dim"):
                keys |= dtypes
        return keys

    def _own(self, kind: Kind, length: int) -> dict[str, Found]:
        """The keys of a kind of layers, without masks that hide nothing at this length and shapes that are the model's."""
        keys = {key: one for key, one in kind.own.items() if key not in MASKS or one.value < length}
        shared = self._of_device(self.model.keys)
        return {
            key: one
            for key, one in self._of_device(keys).items()
            if key not in SHAPES or one.value != shared[key].value
        }

    def _of_device(self, keys: Mapping[str, Found]) -> Mapping[str, Found]:
        return share_of(keys, self.settings.tensor) if self.request.per_device else keys

    def _layout(self) -> Found:
        server, shared = self.request.server, self.model.keys["head_dim"]
        longest = max(kind.own.get("head_dim", shared).value for kind in self.model.kinds)
        if self.settings.kv_dtype.value in QUANTIZED and longest > MAX_BYTES_DIM:
            why = f"8 bits with head_dim above {MAX_BYTES_DIM} need it; {server.adapter}.install gives {server.title} that cache"
            return Found("separate", why)
        why = f"{server.title}'s own layout; {server.adapter}.install takes separate too, which is faster"
        return Found("interleaved", why)

    def _batches(self, sizes: Sizes, length: Found) -> dict[str, Found]:
        tokens = self.settings.max_num_tokens
        most = min(tokens.value, length.value, LATENT_CHUNK if self.model.is_latent else PREFILL_CHUNK)
        chunk = max(most // CHUNK_STEP * CHUNK_STEP, CHUNK_STEP)
        contexts = sorted({max(min(length.value // part, top), 1) for part, top in CONTEXTS})
        return {
            "max_model_len": length,
            "max_num_tokens": tokens,
            "max_num_seqs": sizes.max_num_seqs,
            "prefill_chunk": Found(chunk, "rpac's choice: what a prefill kernel computes at a time"),
            "context_lens": Found(contexts, "a guess from max_model_len: write the lengths that you expect"),
        }

    def _parallel(self) -> dict[str, Found]:
        tensor, data = self.settings.tensor, self.settings.data
        if tensor.value * data.value == 1 or self.request.per_device:
            return {}
        kv_heads = self.model.keys.get("kv_heads", Found(1, "latent"))
        mesh = Mesh.of(self.model.keys["q_heads"].value, kv_heads.value, tensor.value, data.value)
        same = "; the copies do the same work" if mesh.copy > 1 and not mesh.splits_queries else ""
        found = {"tensor": Found(tensor.value, f"{tensor.why}; {mesh}{same}")}
        return found | {"data": data} if data.value > 1 else found

    def _flags(self, sizes: Sizes, length: int) -> Iterator[str]:
        """The server's flags that make it do what the spec says."""
        settings = self.settings
        values = {
            "max_model_len": length,
            "page_size": sizes.page_size.value,
            "max_num_seqs": sizes.max_num_seqs.value,
            "max_num_tokens": settings.max_num_tokens.value,
        }
        values |= {
            key: one.value for key, one in (("tensor", settings.tensor), ("data", settings.data)) if one.value > 1
        }
        if sizes.num_pages is not None:
            pages = sizes.num_pages.value
            values |= {"num_pages": pages, "num_tokens": pages * sizes.page_size.value}
        for flag in self.request.server.flags:
            if flag.key in values:
                yield f"{flag.name} {values[flag.key]}"
        if self.request.kv_cache_dtype != "auto":
            yield f"--kv-cache-dtype {self.request.kv_cache_dtype}"
