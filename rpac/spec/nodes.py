"""YAML text -> one tree of nodes that know their line and column, and typed reads from it.

Every read that fails leaves a `Problem` and returns None, so that one pass finds everything wrong in a file.
Numbers are read as they look, in plain decimal: YAML 1.1 takes 010 for eight and 1:30 for ninety.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from types import MappingProxyType

import yaml

from rpac.errors import Problem

MAX_SIZE = 1 << 16
MAX_PROBLEMS = 50
SHOWN_CHARS = 40
SAME_KEY = 0.82  # of a key's letters: kv_scale and sm_scale share 0.75 and mean different things

# What a model's or a server's own configuration calls things, and how a spec says them.
FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        "num_attention_heads": "write it as model.q_heads",
        "num_heads": "write it as model.q_heads",
        "num_key_value_heads": "write it as model.kv_heads",
        "num_kv_heads": "write it as model.kv_heads",
        "logits_soft_cap": "write it as model.soft_cap",
        "attn_logit_softcapping": "write it as model.soft_cap",
        "k_scale": "write `kv_scale: tensor` and pass both scales as `kv_scales`",
        "v_scale": "write `kv_scale: tensor` and pass both scales as `kv_scales`",
        "q_scale": "remove it and multiply the queries, or multiply model.sm_scale by it",
        "v_head_dim": "remove it, pad the values to head_dim with zeros and cut the output",
        "kv_cache_dtype": "write it as model.kv_dtype",
        "block_size": "write it as serving.page_size",
        "max_position_embeddings": "write it as serving.max_model_len",
        "max_num_batched_tokens": "write it as serving.max_num_tokens",
        "num_gpu_blocks": "write it as serving.num_pages",
        "tensor_parallel_size": "write it as parallel.tensor",
        "data_parallel_size": "write it as parallel.data",
    }
)

# What some models' attention has and no kernel of rpac does, by what it is called there.
ABSENT: Mapping[str, str] = MappingProxyType(
    {
        "blocksparse_block_size": "block-sparse masks",
        "index_topk": "sparse attention to tokens that an indexer chooses",
        "relative_attention_num_buckets": "learned biases of the scores by position",
    }
)

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_LINE_END = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")  # as YAML has them
_TAG = "tag:yaml.org,2002:"
_KINDS = {"bool": "a bool", "timestamp": "a date"}


class _AnchorError(Exception):
    """An anchor or an alias, with the place where it stands."""

    def __init__(self, mark: yaml.Mark) -> None:
        self.mark = mark


class _Loader(yaml.SafeLoader):
    """Composes nodes and stops at the first anchor or alias: a few lines of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise _AnchorError(event.start_mark)
        return super().compose_node(parent, index)


class Report:
    """Collects the problems of one file. `what` it must be, such as "a spec"."""

    def __init__(self, file: str, what: str = "a spec") -> None:
        self.file = file
        self.what = what
        self.problems: list[Problem] = []

    def at(self, line: int | None, column: int | None, where: str, found: str, allowed: str, fix: str) -> None:
        self.problems.append(Problem(self.file, line, column, where, found, allowed, fix))

    def at_mark(self, mark: yaml.Mark, where: str, found: str, allowed: str, fix: str) -> None:
        self.at(mark.line + 1, mark.column + 1, where, found, allowed, fix)

    def at_node(self, node: yaml.Node, where: str, allowed: str, fix: str, found: str | None = None) -> None:
        self.at_mark(node.start_mark, where, found or describe(node), allowed, fix)

    def too_large(self) -> None:
        self.at(
            None, None, "", f"more than {MAX_SIZE} bytes", f"must be {self.what}", "check that it is the right file"
        )

    def in_order(self) -> tuple[Problem, ...]:
        """The problems from the top of the file to its end: the first `MAX_PROBLEMS`, and how many more there are."""
        every = sorted(self.problems, key=lambda p: (p.line or 0, p.column or 0))
        more = len(every) - MAX_PROBLEMS
        if more <= 0:
            return tuple(every)
        rest = Problem(self.file, None, None, "", f"{more} more problems", "must have none", "mend those above first")
        return (*every[:MAX_PROBLEMS], rest)


def show(text: str) -> str:
    """Text as it can be printed on one line: shortened, and quoted where it holds anything odd."""
    if len(text) > SHOWN_CHARS:
        text = text[:SHOWN_CHARS] + "..."
    return text if text.isprintable() and text.isascii() else repr(text)


def describe(node: yaml.Node) -> str:
    """A node in words, for the `found` of a problem."""
    if not isinstance(node, yaml.ScalarNode):
        return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
    tag = _tag(node)
    if tag == "null":
        return "nothing (null)"
    if tag == "str" and (node.style or not node.value):
        return f"the text {show(repr(node.value))}"
    if tag in ("str", "int", "float"):
        return show(node.value)
    return f"{show(node.value)} ({_KINDS.get(tag, f'tagged {show(node.tag)}')})"


def closest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word that was probably meant. `cutoff`: how much of both must agree, from 0 to 1."""
    return next(iter(difflib.get_close_matches(word[:SHOWN_CHARS], list(words), n=1, cutoff=cutoff)), None)


def compose(text: str, report: Report) -> yaml.MappingNode | None:
    """The root mapping of the one document in `text`, or None with the reason in `report`."""
    if len(text) > MAX_SIZE:
        report.too_large()
        return None
    try:
        loader = _Loader(text)
        roots: list[yaml.Node] = []
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # check_node said so
            roots.append(node)
    except _AnchorError as error:
        report.at_mark(error.mark, "", "an anchor or alias", "must be written out", "write the value itself here")
        return None
    except yaml.reader.ReaderError as error:
        line, column = _line_column(text, error.position)
        report.at(line, column, "", f"character {error.character:#06x}", "must be printable text", "remove it")
        return None
    except yaml.MarkedYAMLError as error:
        assert error.problem is not None and error.problem_mark is not None  # every raise in PyYAML gives both
        fix = "indent with spaces" if "\\t" in error.problem else "correct the syntax at this place"
        report.at_mark(error.problem_mark, "", f"a syntax error ({error.problem})", "must be YAML", fix)
        return None
    except RecursionError:
        report.at(None, None, "", "lists or mappings nested too deeply", "must be at most two deep", "flatten it")
        return None
    except (ValueError, OverflowError) as error:
        # PyYAML lets these out for escapes and directives with absurd numbers, with no mark.
        report.at(None, None, "", f"a syntax error ({error})", "must be YAML", "correct the escape or directive")
        return None
    if len(roots) > 1:
        report.at_node(
            roots[1],
            "",
            "must be one document",
            f"keep one {report.what.removeprefix('a ')} a file",
            "a second document",
        )
    if not roots or _tag(roots[0]) == "null":
        fix = "start from one of the shipped specs" if report.what == "a spec" else "check that it is the right file"
        report.at(1, 1, "", "an empty file", f"must be {report.what}", fix)
        return None
    root = roots[0]
    if not isinstance(root, yaml.MappingNode):
        report.at_node(root, "", "must be a mapping", "write it as `key: value` lines")
        return None
    return root


def _line_column(text: str, position: int) -> tuple[int, int]:
    lines = _LINE_END.split(text[:position])
    return len(lines), len(lines[-1]) + 1


class Section:
    """Typed reads from one mapping of the file; `path` is its name with dots, empty for the root."""

    def __init__(
        self, report: Report, node: yaml.MappingNode, path: str, keys: Sequence[str], homes: Mapping[str, str]
    ) -> None:
        """`keys` are all that the mapping may hold; `homes` maps every key of the format to its section's path."""
        self.report = report
        self.path = path
        self._node = node
        self._values: dict[str, yaml.Node] = {}
        self._misspelt: set[str] = set()
        for key_node, value in node.value:
            self._take(key_node, value, keys, homes)

    def _take(self, key_node: yaml.Node, value: yaml.Node, keys: Sequence[str], homes: Mapping[str, str]) -> None:
        if not isinstance(key_node, yaml.ScalarNode):
            self.report.at_node(key_node, self.path, f"must be a key, one of {', '.join(keys)}", "write a key here")
            return
        key: str = key_node.value
        if key in self._values:
            first = self._values[key].start_mark.line + 1
            fix = f"remove this one or line {first}"
            self.report.at_node(key_node, self.where(key), "must be given once", fix, "a second value")
        elif key in keys:
            self._values[key] = value
        else:
            near = closest(key, keys, SAME_KEY)
            if key in homes:
                fix = f"move it under {homes[key]}" if homes[key] else "move it to the top level"
            elif key in ABSENT:
                fix = f"serve this model without rpac, whose kernels have no {ABSENT[key]}"
            elif key in FOREIGN:
                fix = FOREIGN[key]
            else:
                fix = f"write {near}" if near else "remove it"
                self._misspelt.update([near] if near else [])
            allowed = f"must be one of {', '.join(keys)}"
            self.report.at_node(key_node, self.where(show(key)), allowed, fix, "an unknown key")

    def where(self, key: str) -> str:
        """The full name of a key."""
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        return key in self._values

    def clash(self, key: str, allowed: str, fix: str, found: str | None = None) -> None:
        """Reports a value that is fine by itself and impossible beside the others."""
        self.report.at_node(self._values.get(key, self._node), self.where(key), allowed, fix, found)

    def _get(self, key: str, allowed: str, example: str) -> yaml.Node | None:
        node = self._values.get(key)
        if node is None and key not in self._misspelt:
            self.report.at_node(self._node, self.where(key), allowed, f"add `{key}: {example}`", "no such key")
        return node

    def section(self, key: str, keys: Sequence[str], homes: Mapping[str, str]) -> Section | None:
        allowed = f"must be a mapping with {', '.join(keys)}"
        node = self._values.get(key)
        if node is None and key not in self._misspelt:
            fix = f"add `{key}:` and its keys, indented, below it"
            self.report.at_node(self._node, self.where(key), allowed, fix, "no such key")
        if node is None:
            return None
        if isinstance(node, yaml.MappingNode):
            return Section(self.report, node, self.where(key), keys, homes)
        self.report.at_node(node, self.where(key), allowed, f"write its keys, indented, below `{key}:`")
        return None

    def sections(
        self, key: str, pattern: str, allowed: str, keys: Sequence[str], homes: Mapping[str, str], most: int
    ) -> dict[str, Section]:
        """A mapping of at most `most` names, each matching `pattern` (`allowed` in words), to mappings with `keys`.

        The key must be in the section.
        """
        node = self._values[key]
        if not isinstance(node, yaml.MappingNode) or not node.value:
            self.report.at_node(
                node, self.where(key), "must be a mapping of names to mappings", f"indent them below `{key}:`"
            )
            return {}
        if len(node.value) > most:
            fix, count = f"keep {most} of them", f"{len(node.value)} names"
            self.report.at_node(node.value[most][0], self.where(key), f"must be at most {most} of them", fix, count)
            return {}
        found: dict[str, Section] = {}
        for name_node, value in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self.report.at_node(name_node, self.where(key), allowed, "write a name")
                continue
            name = str(name_node.value)
            where = f"{self.where(key)}.{show(name)}"
            if not re.fullmatch(pattern, name) or name in found:
                self.report.at_node(name_node, where, allowed, "write another name")
            elif isinstance(value, yaml.MappingNode):
                found[name] = Section(self.report, value, where, keys, homes)
            else:
                self.report.at_node(value, where, f"must be a mapping with {', '.join(keys)}", "write {} for none")
        return found

    def over(self, base: Section) -> Section:
        """This section with what it does not have taken from `base`; a null of its own leaves a key of `base` out."""
        merged = copy.copy(self)
        unset = {key for key, node in self._values.items() if _tag(node) == "null" and key in base._values}
        every = {**base._values, **self._values}
        merged._values = {key: node for key, node in every.items() if key not in unset}
        return merged

    def text(self, key: str, pattern: str, allowed: str, example: str) -> str | None:
        """A text value that matches the whole of `pattern`."""
        node = self._get(key, allowed, example)
        if node is None:
            return None
        if _tag(node) == "str" and re.fullmatch(pattern, node.value):
            return str(node.value)
        quote = isinstance(node, yaml.ScalarNode) and _tag(node) != "str" and re.fullmatch(pattern, node.value)
        self.report.at_node(node, self.where(key), allowed, f'write "{node.value}"' if quote else f"write {example}")
        return None

    def choice(self, key: str, choices: Sequence[str], refused: Mapping[str, str] = MappingProxyType({})) -> str | None:
        """One of a few words. `refused`: what to do about words that one may look for there."""
        node = self._get(key, f"must be one of {', '.join(choices)}", choices[0])
        return None if node is None else self._word(node, self.where(key), choices, refused)

    def integer(self, key: str, low: int, high: int, example: int) -> int | None:
        """An integer in low..high."""
        node = self._get(key, _range(low, high), str(example))
        return None if node is None else self._int(node, self.where(key), low, high)

    def number(self, key: str, low: float, high: float) -> float | None:
        """A finite number in low..high; the key must be there."""
        node = self._values[key]
        if _is_plain(node) and _NUMBER.fullmatch(node.value) and low <= float(node.value) <= high:
            return float(node.value)
        allowed = f"must be a number from {low:g} to {high:g}"
        self.report.at_node(node, self.where(key), allowed, "write a number in that range, unquoted")
        return None

    def day(self, key: str) -> date | None:
        """A day, written as 2026-12-31, quoted or not. The key must be there."""
        node = self._values[key]
        if isinstance(node, yaml.ScalarNode) and _DAY.fullmatch(node.value):
            with contextlib.suppress(ValueError):  # no such day
                return date.fromisoformat(node.value)
        self.report.at_node(node, self.where(key), "must be a day, as year-month-day", "write it as 2026-12-31")
        return None

    def flag(self, key: str) -> bool | None:
        """True or false, written so: YAML 1.1 takes yes, no, on and off for them too. The key must be there."""
        node = self._values[key]
        if _is_plain(node) and node.value in ("true", "false"):
            return bool(node.value == "true")
        self.report.at_node(node, self.where(key), "must be true or false", "write one of them, unquoted")
        return None

    def integers(self, key: str, low: int, high: int, example: str, most: int) -> tuple[int, ...] | None:
        """A list of at most `most` integers in low..high, each greater than the one before."""
        nodes = self._list(key, f"must be a list of integers from {low} to {high}, ascending", example)
        if nodes is None:
            return None
        if len(nodes) > most:
            fix = f"keep {most} of them"
            self.report.at_node(
                nodes[most], self.where(key), f"must be at most {most} of them", fix, f"{len(nodes)} numbers"
            )
            return None
        numbers = [self._int(node, f"{self.where(key)}[{i}]", low, high) for i, node in enumerate(nodes)]
        good = [number for number in numbers if number is not None]
        if len(good) < len(numbers):
            return None
        for i in range(1, len(good)):
            if good[i] <= good[i - 1]:
                where = f"{self.where(key)}[{i}]"
                fix = "sort the list" if good[i] < good[i - 1] else "sort the list and drop repeats"
                self.report.at_node(nodes[i], where, f"must be above the {good[i - 1]} before it", fix)
                return None
        return tuple(good)

    def words(
        self, key: str, choices: Sequence[str], example: str, refused: Mapping[str, str]
    ) -> tuple[str, ...] | None:
        """A list of different words, each one of `choices`. `refused`: what to do about words that one may look for there."""
        nodes = self._list(key, f"must be a list of {', '.join(choices)}", example)
        if nodes is None:
            return None
        good: list[str] = []
        for i, node in enumerate(nodes):
            where = f"{self.where(key)}[{i}]"
            word = self._word(node, where, choices, refused)
            if word in good:
                self.report.at_node(node, where, "must be listed once", "remove it", f"{word} a second time")
            elif word is not None:
                good.append(word)
        return tuple(good) if len(good) == len(nodes) else None

    def _list(self, key: str, allowed: str, example: str) -> list[yaml.Node] | None:
        node = self._get(key, allowed, example)
        if node is None:
            return None
        if isinstance(node, yaml.SequenceNode) and node.value:
            return list(node.value)
        found = "an empty list" if isinstance(node, yaml.SequenceNode) else None
        self.report.at_node(node, self.where(key), allowed, f"write {example}", found)
        return None

    def _int(self, node: yaml.Node, where: str, low: int, high: int) -> int | None:
        allowed = _range(low, high)
        if _is_plain(node) and _tag(node) == "int" and _INTEGER.fullmatch(node.value):
            # Nothing this long is in range, and int() itself refuses a few thousand digits.
            value = int(node.value) if len(node.value) < SHOWN_CHARS else None
            if value is not None and low <= value <= high:
                return value
            below = node.value.startswith("-") or (value is not None and value < low)
            self.report.at_node(node, where, allowed, f"write {low} or more" if below else f"write {high} or less")
        elif isinstance(node, yaml.ScalarNode) and _INTEGER.fullmatch(node.value):
            self.report.at_node(node, where, allowed, f"write {show(node.value)} without quotes or tag")
        else:
            self.report.at_node(node, where, allowed, "write it in plain decimal digits")
        return None

    def _word(
        self, node: yaml.Node, where: str, choices: Sequence[str], refused: Mapping[str, str] = MappingProxyType({})
    ) -> str | None:
        if isinstance(node, yaml.ScalarNode) and _tag(node) == "str" and node.value in choices:
            return str(node.value)
        near = closest(node.value, choices) if isinstance(node, yaml.ScalarNode) else None
        fix = f"write {near}" if near else "write one of them"
        if isinstance(node, yaml.ScalarNode):
            fix = refused.get(node.value, fix)
        self.report.at_node(node, where, f"must be one of {', '.join(choices)}", fix)
        return None


def _tag(node: yaml.Node) -> str:
    return str(node.tag).removeprefix(_TAG)


def _is_plain(node: yaml.Node) -> bool:
    """Whether it is a scalar without quotes."""
    return isinstance(node, yaml.ScalarNode) and not node.style


def _range(low: int, high: int) -> str:
    return f"must be an integer from {low} to {high}"
