"""Reads the weights of a checkpoint folder: *.safetensors, with an index if there are several.

A tensor that is missing, is one too many, or has another shape than config.json says, is refused by name, before any is read.
Then one tensor at a time is read, converted and put where the step takes it, so the host never holds all of them.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from serve.config import Config, read_json
from serve.errors import CheckpointError
from serve.weights import Params, Weight, shapes, table

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
STORED = ("BF16", "F16", "F32")
NOT_WEIGHTS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Old checkpoints hold the frequencies of rotary positions too, which follow from config.json."""

Shardings = Callable[[Weight], jax.sharding.Sharding | None]


def load_params(folder: Path, config: Config, sharding_of: Shardings = lambda weight: None) -> Params:
    """The weights in `config.dtype`, where `sharding_of` says, by default on the first device.

    Raises CheckpointError for files and tensors that do not fit `config`.
    """
    wanted = table(config)
    files = _files(folder)
    names = {one.name: one for one in jax.tree.leaves(wanted)}
    _check_names(folder, config, set(names), files)
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(_opened(path)) for path in dict.fromkeys(files[name] for name in names)}
        for name, weight in names.items():
            _check(files[name], name, weight, opened[files[name]].get_slice(name))

        def load(weight: Weight, shape: jax.ShapeDtypeStruct) -> jax.Array:
            tensor = opened[files[weight.name]].get_tensor(weight.name)
            array = np.ascontiguousarray(tensor.T if weight.is_matrix else tensor).astype(shape.dtype, copy=False)
            # Finished before the next is read, which bounds the memory of the host.
            return jax.block_until_ready(jax.device_put(array, sharding_of(weight)))

        params: Params = jax.tree.map(load, wanted, shapes(config))
    return params


def _files(folder: Path) -> Mapping[str, Path]:
    """The file of each tensor in a folder."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(
                folder / INDEX,
                "weight_map",
                type(weight_map).__name__,
                "must be an object of file names",
                "download it again",
            )
        if any(Path(name).name != name for name in weight_map.values()):
            raise CheckpointError(
                folder / INDEX, "weight_map", "a path", "must be names of files in this folder", "download it again"
            )
        files = {tensor: folder / name for tensor, name in weight_map.items()}
        for path in sorted(set(files.values())):
            with _opened(path) as file:
                has = set(file.keys())
            for tensor in sorted(name for name, where in files.items() if where == path and name not in has):
                raise CheckpointError(path, tensor, "no such tensor", f"must exist, by {INDEX}", "download both again")
        return files
    if not (folder / SINGLE).exists():
        raise CheckpointError(
            folder, "", f"neither {SINGLE} nor {INDEX}", "must have one of them", "give a folder as model hubs have it"
        )
    with _opened(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise CheckpointError(path, "", "no file", f"must exist, by {INDEX}", "download it") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, "", str(error), "must be a safetensors file", "download it again") from error


def _check_names(folder: Path, config: Config, wanted: set[str], files: Mapping[str, Path]) -> None:
    given = {name for name in files if not NOT_WEIGHTS.fullmatch(name)}
    if config.tied:
        given -= {"lm_head.weight"}  # some hold it beside the embedding, which is the same
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing:
        near = difflib.get_close_matches(missing[0], extra, 1)
        has = f"no such tensor, but {near[0]}" if near else "no such tensor"
        raise CheckpointError(
            folder, missing[0], f"{has} ({len(missing)} are missing)", "must exist, by config.json",
            "download all files of the checkpoint, or correct config.json",
        )  # fmt: skip
    if extra:
        raise CheckpointError(
            files[extra[0]], extra[0], f"a tensor that this model does not have ({len(extra)} such)",
            "must be none, by config.json", "correct config.json, or serve a model of this architecture",
        )  # fmt: skip


def _check(path: Path, name: str, weight: Weight, tensor: Any) -> None:
    found, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    stored = weight.shape[::-1] if weight.is_matrix else weight.shape
    if found != stored:
        raise CheckpointError(
            path, name, f"the shape {list(found)}", f"must be {list(stored)}, by config.json",
            "correct config.json, or download the file again",
        )  # fmt: skip
    if dtype not in STORED:
        raise CheckpointError(
            path,
            name,
            f"the dtype {dtype}",
            f"must be one of {', '.join(STORED)}",
            "serve a checkpoint without quantization",
        )
