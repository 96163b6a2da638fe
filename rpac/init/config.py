"""Reads config.json and the index of the weights as model hubs have them: untrusted JSON, limited in size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from rpac.errors import ModelError, Problem
from rpac.spec.nodes import show

MAX_CONFIG: Final = 4 << 20  # bytes; the longest on public hubs have some 100 KiB
MAX_INDEX: Final = 64 << 20
MAX_COUNT: Final = 1 << 31
CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
WEIGHTS: Final = "*.safetensors"

# Where a model of several parts keeps the part that writes text.
TEXT_PARTS: Final = (
    "text_config", "llm_config", "language_config", "thinker_config", "vlm_config", "decoder_config", "decoder",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A value, in words where it comes from, and the key of config.json that it follows from, if one does."""

    value: Any
    why: str
    key: str = ""

    def made(self, value: Any, why: str | None = None) -> Found:
        """Another value that follows from the same key."""
        return Found(value, self.why if why is None else why, self.key)


def refuse(file: str, where: str, found: str, allowed: str, fix: str) -> NoReturn:
    """Raises ModelError for one value of a file or one flag."""
    raise ModelError([Problem(file, None, None, where, found, allowed, fix)])


def shown(value: Any) -> str:
    """A value of a JSON file as an error or a comment can print it."""
    return show(value if isinstance(value, str) else json.dumps(value, allow_nan=True, default=str))


class Config:
    """One mapping of a config.json. Keys may have dots: `attn_config.alibi`. A key that is null has no value, and no default.

    `path` is where the mapping is in the file. `defaults` are what the model's class takes for keys that are left out, and
    `model_type` says whose defaults they are.
    """

    def __init__(
        self,
        file: str,
        values: Mapping[str, Any],
        path: str = "",
        defaults: Mapping[str, Any] | None = None,
        model_type: str = "",
    ) -> None:
        self.file = file
        self.path = path
        self.model_type = model_type
        self._values = values
        self._defaults = defaults or {}

    def with_defaults(self, model_type: str, defaults: Mapping[str, Any]) -> Config:
        """The same mapping, with the defaults of a model's class."""
        return Config(self.file, self._values, self.path, defaults, model_type)

    def given(self) -> Iterable[str]:
        """The keys that the file itself gives."""
        return [key for key, value in self._values.items() if value is not None]

    def part(self, key: str) -> Config | None:
        """A nested mapping; None where there is none."""
        value = self._values.get(key)
        return Config(self.file, value, self.where(key)) if isinstance(value, dict) else None

    def where(self, key: str) -> str:
        """The full name of a key in the file."""
        return f"{self.path}.{key}" if self.path else key

    def get(self, *names: str) -> Found | None:
        """The first of some keys that has a value: all of the file come before all defaults."""
        for name in names:
            value = self._lookup(name)
            if value is not None:
                where = self.where(name)
                return Found(value, f"{self.name}: {where} {_brief(value)}", where)
        for name in names:
            value = self._defaults.get(name)
            if value is not None and name not in self._values:
                why = f"{name} {_brief(value)}, the default of model_type {self.model_type}"
                return Found(value, why, self.where(name))
        return None

    def name_of(self, *names: str) -> str:
        """Which of some keys `get` would take; the first where none has a value."""
        return next((name for name in names if self._lookup(name) is not None), names[0])

    def integer(self, *names: str, low: int = 1, high: int = MAX_COUNT) -> Found | None:
        """An integer from `low` to `high`. Raises ModelError for anything else."""
        return self._typed(
            names,
            lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
            f"must be an integer from {low} to {high}",
        )

    def number(self, *names: str, low: float = 0.0) -> Found | None:
        """A finite number above `low`. Raises ModelError for anything else."""

        def is_number(value: Any) -> bool:
            # neither infinity nor NaN passes
            return isinstance(value, int | float) and not isinstance(value, bool) and low < value < 1e12

        return self._typed(names, is_number, f"must be a number above {low:g}")

    def flag(self, *names: str) -> Found | None:
        """`true` or `false`. Raises ModelError for anything else."""
        return self._typed(names, lambda value: isinstance(value, bool), "must be true or false")

    def word(self, *names: str) -> str:
        """A text; empty where there is none, or something else."""
        found = self.get(*names)
        return found.value if found is not None and isinstance(found.value, str) else ""

    def entries(self, *names: str) -> Found | None:
        """A list, one entry a layer as a rule. Raises ModelError for anything else."""
        return self._typed(names, lambda value: isinstance(value, list), "must be a list")

    @property
    def name(self) -> str:
        """The file's name, for comments."""
        return Path(self.file).name

    def refuse(self, names: Sequence[str] | str, allowed: str, fix: str, found: str | None = None) -> NoReturn:
        """Raises ModelError for the value of a key; `found` shows a part of it."""
        name = names if isinstance(names, str) else self.name_of(*names)
        if found is None:
            value = self.get(name)
            found = "no such key" if value is None else shown(value.value)
        refuse(self.file, self.where(name), found, allowed, fix)

    def _lookup(self, name: str) -> Any:
        value: Any = self._values
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def _typed(self, names: Sequence[str], is_valid: Callable[[Any], bool], allowed: str) -> Found | None:
        found = self.get(*names)
        if found is not None and not is_valid(found.value):
            self.refuse(names, allowed, "correct the file, or write the spec by hand")
        return found


def _brief(value: Any) -> str:
    """A value in a comment: lists are counted."""
    if isinstance(value, list):
        return f"(a list of {len(value)})"
    return "(a mapping)" if isinstance(value, dict) else shown(value)


def load_config(model: Path) -> Config:
    """The config.json at `model`, or in the folder `model`. Raises ModelError for what is no such file."""
    path = model / CONFIG if model.is_dir() else model
    file = os.fspath(path)
    if model.is_dir() and not path.is_file():
        refuse(os.fspath(model), "", f"a folder without {CONFIG}", "must be a model as a hub has it", "check the path")
    values = _read_json(path, MAX_CONFIG)
    if not isinstance(values, dict):
        refuse(file, "", "JSON that is no mapping", "must be a model's config.json", "check the path")
    return Config(file, values)


def weights_bytes(model: Path) -> Found | None:
    """Bytes of the weights beside a config.json: what their index says, or the sizes of the files; None without either."""
    folder = model if model.is_dir() else model.parent
    index = folder / INDEX
    if index.is_file():
        values = _read_json(index, MAX_INDEX)
        metadata = values.get("metadata") if isinstance(values, dict) else None
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if not isinstance(total, int | float) or isinstance(total, bool) or not 0 < total < 1 << 60:
            found = "no such key" if total is None else shown(total)
            refuse(
                os.fspath(index), "metadata.total_size", found, "must be a number of bytes", "download the file again"
            )
        return Found(int(total), f"{INDEX}: metadata.total_size {int(total)}")
    sizes = [file.stat().st_size for file in sorted(folder.glob(WEIGHTS)) if file.is_file()]
    return Found(sum(sizes), f"the sizes of {len(sizes)} files {WEIGHTS}") if sum(sizes) else None


def _read_json(path: Path, most: int) -> Any:
    file = os.fspath(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(most + 1)
    except (OSError, ValueError) as error:
        found = f"a file that cannot be read ({getattr(error, 'strerror', None) or error})"
        fix = "check the path, or download the model: rpac uses no network"
        refuse(file, "", found, "must be a folder with config.json, or that file", fix)
    if len(data) > most:
        refuse(
            file, "", f"more than {most} bytes", "must be a JSON file of a model hub", "check that it is the right file"
        )
    try:
        return json.loads(data.decode("utf-8"))  # Infinity and NaN too: some files have them where no one reads them
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else show(str(error))
        refuse(file, "", f"a file that is not JSON ({what})", "must be JSON in UTF-8", "download the file again")
