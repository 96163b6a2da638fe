"""Strict access to parsed JSON: every value is checked where it is taken, and every error names its place.

JSON's own types only: a boolean is no integer, a key too many is as wrong as one too few.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from rpac.contract.program import Content
from rpac.errors import BundleError

SHA256 = r"[0-9a-f]{64}"


class Node:
    """One value of a document; `where` is its path from the root, `file` the document's."""

    def __init__(self, file: str, where: str, value: Any) -> None:
        self.file = file
        self.where = where
        self.value = value

    def refuse(self, must: str) -> BundleError:
        """The error that says what this value must be."""
        shown = repr(self.value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return BundleError(f"{self.file}: {self.where}: found {shown}; must be {must}; build the bundle again")

    def fields(self, *names: str, optional: Collection[str] = ()) -> dict[str, Node]:
        """The values of an object that has exactly these keys, and maybe some of `optional`."""
        found = self.items()
        if not set(names) <= set(found) <= {*names, *optional}:
            missing = [f"no {name!r}" for name in names if name not in found]
            unknown = [f"an unknown {name!r}" for name in found if name not in (*names, *optional)]
            raise BundleError(
                f"{self.file}: {self.where}: found {' and '.join(missing + unknown)}; "
                f"must have exactly {', '.join(names)}; build the bundle again"
            )
        return found

    def items(self) -> dict[str, Node]:
        """The values of an object with any keys."""
        return {key: Node(self.file, f"{self.where}.{key}", value) for key, value in self.mapping().items()}

    def mapping(self) -> Mapping[str, Any]:
        """An object as it is; what is in it is not checked."""
        if not isinstance(self.value, dict):
            raise self.refuse("an object")
        return self.value

    def elements(self) -> list[Node]:
        """The values of a list."""
        if not isinstance(self.value, list):
            raise self.refuse("a list")
        return [Node(self.file, f"{self.where}[{index}]", value) for index, value in enumerate(self.value)]

    def integer(self, low: int, high: int) -> int:
        if type(self.value) is not int or not low <= self.value <= high:
            raise self.refuse(f"an integer from {low} to {high}")
        return self.value

    def number(self) -> float:
        if type(self.value) not in (int, float):
            raise self.refuse("a number")
        return float(self.value)

    def flag(self) -> bool:
        if type(self.value) is not bool:
            raise self.refuse("true or false")
        return self.value

    def text(self, pattern: str, allowed: str) -> str:
        """A string that matches `pattern` as a whole; `allowed` is the pattern in words."""
        if not isinstance(self.value, str) or not re.fullmatch(pattern, self.value):
            raise self.refuse(allowed)
        return self.value

    def choice(self, allowed: Collection[str]) -> str:
        if not isinstance(self.value, str) or self.value not in allowed:
            raise self.refuse(f"one of {', '.join(sorted(allowed))}")
        return self.value

    def content(self, limit: int) -> Content:
        """The hash of a file and its size, which is at most `limit` bytes."""
        fields = self.fields("sha256", "size")
        return Content(fields["sha256"].text(SHA256, "64 hex digits"), fields["size"].integer(1, limit))

    def strings(self) -> dict[str, str]:
        """An object whose values are all strings."""
        if not all(isinstance(value, str) for value in self.mapping().values()):
            raise self.refuse("an object of strings")
        return dict(self.mapping())
