"""What the fuzz tests share: seeded cases, the corpus of inputs that once found a fault, and what a fault looks like.

`make test` runs the corpus and a fixed number of cases from a fixed seed, so that it says the same everywhere. `make fuzz` sets
`RPAC_FUZZ_SECONDS`: each test then goes on for so long, from a new seed or from `RPAC_FUZZ_SEED`, and keeps what finds a fault in
the corpus.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).with_name("corpus")
SECONDS = float(os.environ.get("RPAC_FUZZ_SECONDS", 0))
SEED = os.environ.get("RPAC_FUZZ_SEED") or (str(random.SystemRandom().randrange(2**32)) if SECONDS else "rpac")


def fuzz(area: str, count: int, make: Callable[[random.Random], bytes], check: Callable[[bytes], object]) -> None:
    """Runs `check` on what is kept in the corpus of an area, and on `count` inputs that `make` draws; or for as long as
    `RPAC_FUZZ_SECONDS` says.

    `check` raises for a fault, such as any error but rpac's own. A case is drawn from its own seed, so each can be run alone.
    """
    for path in sorted((CORPUS / area).glob("*")):
        _run(area, path.name, path.read_bytes(), check)
    for case in _cases(count):
        name = f"{SEED}-{case}"
        _run(area, name, make(random.Random(f"{area} {name}")), check)


def _cases(count: int) -> Iterator[int]:
    deadline, case = time.monotonic() + SECONDS, 0
    while time.monotonic() < deadline if SECONDS else case < count:
        yield case
        case += 1
    print(f"{case} cases of seed {SEED}")


def _run(area: str, name: str, data: bytes, check: Callable[[bytes], object]) -> None:
    try:
        check(data)
    except Exception as error:
        kept = f"{data[:2000]!r}"
        if SECONDS:
            path = CORPUS / area / hashlib.sha256(data).hexdigest()[:16]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            kept = str(path)
        raise AssertionError(f"{area}, case {name}: {type(error).__name__}: {error}\nThe input: {kept}") from error


VALUES: list[Any] = [
    0, 1, -1, 2, 7, 127, 128, 2**31 - 1, 2**31, -(2**31), 2**63, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1e308, -1e308,
    1e-320, True, False, None, "", "a", "0", "é", "日", "\x00", "\ud800", "x" * 5000, "../../etc", "/", ".", "null", [], {}, [[]],
    [0], [0] * 1000, {"": 0}, {"a": {"b": []}},
]  # fmt: skip
"""What parsers get wrong."""


def deep(levels: int = 3000) -> Any:
    """A list in a list, and so on."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def mutate_tree(rng: random.Random, tree: Any, times: int = 0) -> Any:
    """A copy of a JSON document with one to three changes, or `times`: another value, a key or an element that is gone, doubled,
    renamed, or taken from elsewhere in it.
    """
    tree = _copied(tree)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1:
                holder[key] = _copied(rng.choice(VALUES))
            case 2:
                del holder[key]
            case 3:
                other, at = rng.choice(places)
                holder[key] = _copied(other[at]) if at in _keys(other) else None
            case 4 if isinstance(holder, dict):
                holder[rng.choice(["", "x", str(key).upper(), f"{key} ", "schema", "digest"])] = holder.pop(key)
            case 4:
                holder.insert(int(key), _copied(holder[key]))
            case _:
                holder[key] = _near(rng, holder[key])
    return tree


def mutate_text(rng: random.Random, text: bytes, others: bytes = b"") -> bytes:
    """A text with one to four changes: bytes, words, numbers and lines that are gone, doubled, changed or moved; words also come
    from `others`.
    """
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = text.split(b"\n")
        at = rng.randrange(len(lines))
        position = rng.randrange(len(text) + 1)
        words = (others or text).split() or [b""]
        match rng.randrange(10):
            case 0:
                del lines[at]
                text = b"\n".join(lines)
            case 1:
                lines.insert(rng.randrange(len(lines) + 1), lines[at])
                text = b"\n".join(lines)
            case 2:
                lines[at] = b" " * rng.randrange(9) + lines[at].lstrip()
                text = b"\n".join(lines)
            case 3:
                text = text[:position]
            case 4:
                text = text[:position] + bytes([rng.randrange(256)]) + text[position + 1 :]
            case 5:
                text = text[:position] + rng.choice(SNIPPETS) + text[position:]
            case 6 | 7:
                parts = lines[at].split(b" ")
                parts[-1] = _scalar(rng)
                lines[at] = b" ".join(parts)
                text = b"\n".join(lines)
            case 8:
                parts = lines[at].split(b" ")
                parts[rng.randrange(len(parts))] = rng.choice(words)
                lines[at] = b" ".join(parts)
                text = b"\n".join(lines)
            case _:
                numbers = [one for one in words if one.strip(b",[]").isdigit()]
                if numbers:
                    text = text.replace(rng.choice(numbers), _scalar(rng), 1)
    return text


SNIPPETS = [
    b"\t", b"\r\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b": ", b"- ", b"{", b"[", b"}", b"]", b"&a ", b"*a", b"<<: *a",
    b"!!binary ", b"!!python/object:x ", b"|\n", b"? ", b"---\n", b"...\n", b"%YAML 9.9\n", b"#", b"'", b'"', b"\\",
    b"\xe2\x80\xa8", b"[" * 2000,
    b"{a: " * 500, b"e" * 3000, b"{{ 7 * 7 }}", b"${HOME}", b"\n" * 50,
]  # fmt: skip


def _scalar(rng: random.Random) -> bytes:
    return rng.choice([*SCALARS.split(), b"1" * 4400, b"[1, 2]", b"{a: 1}"])


SCALARS = b"""
0 1 -1 2 3 7 8 16 63 64 100 128 129 1000 4096 65536 1048576 16777216 2147483647 2147483648 9223372036854775808
10000000000000000000000000000000000000000 1_000 0x10 0o17 1e3 1e400 -1e400 .inf .nan 0.5 1.0 ~ null true yes "" [] {} 2026-01-01
bfloat16 float32 int8 float8_e4m3fn tpu7x cpu
"""


def _near(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return rng.choice([not value, 0, 1])
    if isinstance(value, int):
        near = [value + 1, value - 1, 2 * value, -value]
        return rng.choice(near if abs(value) > 10**300 else [*near, float(value), str(value)])
    if isinstance(value, float):
        return rng.choice([value + 1, -value, int(value) if abs(value) < 1e300 else 0, str(value)])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice(
            [value[:at] + value[at + 1 :], value[:at] + "A" + value[at:], value.upper(), value + "\n", value[::-1]]
        )
    if isinstance(value, list):
        return rng.choice([value[::-1], value + value, value[1:], dict(enumerate(map(str, value)))])
    return list(value) if rng.random() < 0.5 else {**value, "x": 1}


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a document, as what holds it and its key or index there."""
    for key in _keys(tree):
        yield tree, key
        yield from _places(tree[key])


def _keys(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return list(tree)
    return list(range(len(tree))) if isinstance(tree, list) else []


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value
