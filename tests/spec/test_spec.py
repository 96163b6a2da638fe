"""A spec is read strictly: what is valid becomes data, and anything else becomes a SpecError."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from rpac.devices.chip import TPU_TARGETS
from rpac.errors import SpecError
from rpac.spec import TARGETS, Spec, load_spec, parse_spec

SPECS = Path(__file__).parents[2] / "specs"
SHIPPED = sorted(SPECS.glob("*.yaml"))
TINY = (SPECS / "tiny.yaml").read_text().replace("max_model_len: 512", "max_model_len: 128")


def edited(old: str, new: str) -> str:
    """The tiny spec with one line's text changed."""
    assert TINY.count(old) == 1
    return TINY.replace(old, new)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_spec_is_valid_and_named_after_its_file(path: Path) -> None:
    spec = load_spec(path)
    assert spec.name == path.stem
    assert spec.targets == (*TPU_TARGETS, "cpu")
    assert spec.source == path.read_text()
    assert spec.file == str(path)


@pytest.mark.parametrize(
    "name, q_heads, kv_heads",
    [
        ("llama3-8b", 32, 8),
        ("llama3-70b-tp8", 64 // 8, 8 // 8),
        ("qwen3-32b-tp4", 64 // 4, 8 // 4),
        ("mistral-7b", 32, 8),
    ],
)
def test_shipped_specs_have_the_published_heads(name: str, q_heads: int, kv_heads: int) -> None:
    model = load_spec(SPECS / f"{name}.yaml").model
    assert (model.q_heads, model.kv_heads, model.head_dim) == (q_heads, kv_heads, 128)
    assert model.group == q_heads // kv_heads


def test_values_are_read_as_written() -> None:
    spec = parse_spec(TINY, "tiny.yaml")
    assert (spec.model.q_dtype, spec.model.kv_dtype) == ("bfloat16", "bfloat16")
    assert spec.serving.page_size == 16
    assert spec.serving.max_model_len == 128
    assert spec.serving.max_num_tokens == 32
    assert spec.serving.token_buckets == (8, 32)
    assert spec.serving.max_num_seqs == 4
    assert spec.serving.prefill_chunk == 16
    assert spec.serving.context_lens == (40, 100)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "tensor", "of_device"),
    [(48, 1, 4, (12, 1)), (64, 2, 8, (8, 1)), (32, 1, 2, (16, 1)), (128, 4, 8, (16, 1)), (32, 2, 1, (32, 2))],
)
def test_the_ratio_of_heads_is_that_of_one_device(
    q_heads: int, kv_heads: int, tensor: int, of_device: tuple[int, int]
) -> None:
    """StarCoder has 48 query heads on one KV head: too many for a kernel, and 12 of them on each of four devices."""
    text = TINY.replace("q_heads: 4", f"q_heads: {q_heads}").replace("kv_heads: 2", f"kv_heads: {kv_heads}")
    model = parse_spec(f"{text}\nparallel: {{tensor: {tensor}}}", "x.yaml").model
    assert (model.q_heads, model.kv_heads) == of_device


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "tensor", "said"),
    [
        (64, 2, 2, "found 64; must leave each device at most 16 times its KV heads; `parallel` leaves 32 query heads and 1 KV "
         "heads there; write 32 or less, or change kv_heads or parallel.tensor"),
        (20, 1, 8, "found 20; must be at most 16 times kv_heads (1); write 16 or less, or change kv_heads"),  # 8 copies of all
    ],
)  # fmt: skip
def test_a_ratio_that_a_device_keeps_is_refused(q_heads: int, kv_heads: int, tensor: int, said: str) -> None:
    text = TINY.replace("q_heads: 4", f"q_heads: {q_heads}").replace("kv_heads: 2", f"kv_heads: {kv_heads}")
    with pytest.raises(SpecError) as raised:
        parse_spec(f"{text}\nparallel: {{tensor: {tensor}}}", "x.yaml")
    assert str(raised.value) == f"x.yaml:4:12: model.q_heads: {said}"


def test_pages_of_a_sequence_follow_from_its_longest_length() -> None:
    assert parse_spec(TINY, "").serving.pages_per_seq == 128 // 16


def test_scale_defaults_to_the_inverse_root_of_head_dim() -> None:
    assert parse_spec(TINY, "").model.sm_scale == 128**-0.5


@pytest.mark.parametrize("text, value", [("0.125", 0.125), ("1", 1.0), ("1e-3", 1e-3), ("1.5E+2", 150.0), (".5", 0.5)])
def test_scale_is_read_in_any_usual_notation(text: str, value: float) -> None:
    assert parse_spec(edited("head_dim: 128", f"head_dim: 128\n  sm_scale: {text}"), "").model.sm_scale == value


FEATURES = {"soft_cap: 50.0": 50.0, "sliding_window: 100": 100, "attention_chunk: 32": 32, "sinks: true": True}


@pytest.mark.parametrize("line", FEATURES)
def test_a_feature_is_part_of_what_a_spec_means_only_where_it_is_used(line: str) -> None:
    name = line.split(":")[0]
    plain, used = parse_spec(TINY, ""), parse_spec(edited("head_dim: 128", f"head_dim: 128\n  {line}"), "")
    assert getattr(used.model, name) == FEATURES[line] == used.meaning()["model"][name]
    assert name not in plain.meaning()["model"]
    assert used.hash != plain.hash
    if name == "sinks":
        unused = parse_spec(edited("head_dim: 128", "head_dim: 128\n  sinks: false"), "")
        assert unused.hash == plain.hash


def test_cache_defaults_to_a_full_table_for_every_sequence() -> None:
    assert parse_spec(TINY, "").serving.num_pages == 4 * (128 // 16)


def test_cache_is_laid_out_as_that_of_rpa_v3_unless_the_spec_says_otherwise() -> None:
    assert parse_spec(TINY, "").serving.kv_layout == "interleaved"
    separate = edited("page_size: 16", "page_size: 16\n  kv_layout: separate")
    assert parse_spec(separate, "").serving.kv_layout == "separate"


@pytest.mark.parametrize(
    "max_tokens, buckets", [(32, (16, 32)), (100, (16, 32, 64, 100)), (16, (16,)), (7, (7,)), (17, (16, 17))]
)
def test_buckets_default_to_powers_of_two_up_to_the_most_tokens(max_tokens: int, buckets: tuple[int, ...]) -> None:
    text = edited("  token_buckets: [8, 32]\n", "").replace("max_num_tokens: 32", f"max_num_tokens: {max_tokens}")
    text = text.replace("prefill_chunk: 16", "prefill_chunk: 4")
    assert parse_spec(text, "").serving.token_buckets == buckets


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\n" + TINY,
        TINY.replace("[8, 32]", "\n  - 8\n  - 32"),
        TINY + "  \n\n# end\n",
        TINY.replace("name: tiny", 'name: "tiny"'),
        TINY.replace("\n", "\r\n"),
        "\ufeff" + TINY,
        edited("head_dim: 128", "head_dim: 128\n  sm_scale: 0.08838834764831845"),
        edited("context_lens: [40, 100]", "context_lens: [40, 100]\n  num_pages: 32"),
        edited("context_lens: [40, 100]", "context_lens: [40, 100]\n  kv_layout: interleaved"),
    ],
    ids=[
        "comment",
        "block list",
        "blank end",
        "quoted name",
        "crlf",
        "byte order mark",
        "default scale",
        "default pages",
        "default layout",
    ],
)
def test_hash_and_equality_ignore_how_a_spec_is_written(text: str) -> None:
    spec = parse_spec(TINY, "tiny.yaml")
    other = parse_spec(text, "other.yaml")
    assert other == spec
    assert other.hash == spec.hash


@pytest.mark.parametrize(
    "old, new",
    [
        ("name: tiny", "name: tiny2"),
        ("q_heads: 4", "q_heads: 8"),
        ("page_size: 16", "page_size: 32"),
        ("[8, 32]", "[16, 32]"),
        (", cpu]", "]"),
        ("head_dim: 128", "head_dim: 128\n  sm_scale: 0.0883883"),
        ("page_size: 16", "page_size: 16\n  kv_layout: separate"),
    ],
)
def test_hash_changes_with_any_value(old: str, new: str) -> None:
    assert parse_spec(edited(old, new), "").hash != parse_spec(TINY, "").hash


def test_hash_is_the_same_in_every_process_and_version() -> None:
    """Bundles are addressed by it: a change here is a change of format, to be made on purpose."""
    assert parse_spec(TINY, "").hash == "31d297618df0c9e04236c79170e86136590ea8a84d206079f5b9d99049326abf"


LARGEST = {
    "heads": ({"q_heads: 4": "q_heads: 1024", "kv_heads: 2": "kv_heads: 1024"}, 1024, lambda s: s.model.kv_heads),
    "group": ({"q_heads: 4": "q_heads: 32"}, 16, lambda s: s.model.group),
    "head_dim": ({"head_dim: 128": "head_dim: 256"}, 256, lambda s: s.model.head_dim),
    "page_size": ({"page_size: 16": "page_size: 256", "len: 128": "len: 256"}, 256, lambda s: s.serving.page_size),
    "length": ({"len: 128": "len: 1048576"}, 2**20, lambda s: s.serving.max_model_len),
    "tokens": ({"tokens: 32": "tokens: 1048576", "8, 32": "8, 1048576"}, 2**20, lambda s: s.serving.token_buckets[-1]),
    "sequences": (
        {"tokens: 32": "tokens: 4096", "8, 32": "4096", "seqs: 4": "seqs: 4096"}, 4096, lambda s: s.serving.max_num_seqs
    ),
    "one sequence a token": ({"max_num_seqs: 4": "max_num_seqs: 32"}, 32, lambda s: s.serving.max_num_seqs),
    "chunk": ({"chunk: 16": "chunk: 32"}, 32, lambda s: s.serving.prefill_chunk),
    "context": ({"40, 100": "40, 128"}, 128, lambda s: s.serving.context_lens[-1]),
    "pages": ({"chunk: 16": "chunk: 16\n  num_pages: 134217727"}, 134217727, lambda s: s.serving.num_pages),
    "fewest pages": ({"chunk: 16": "chunk: 16\n  num_pages: 8"}, 8, lambda s: s.serving.num_pages),
    "name": ({"name: tiny": "name: " + "a" * 64}, "a" * 64, lambda s: s.name),
}  # fmt: skip


@pytest.mark.parametrize("edits, value, read", LARGEST.values(), ids=LARGEST.keys())
def test_bounds_are_allowed_themselves(edits: dict[str, str], value: object, read: Callable[[Spec], object]) -> None:
    text = TINY
    for old, new in edits.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    assert read(parse_spec(text, "")) == value


def test_a_file_may_be_64_kib_long(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text(TINY + "#" * (2**16 - len(TINY)))
    assert load_spec(path) == parse_spec(TINY, "")


def test_a_spec_cannot_be_changed() -> None:
    spec = parse_spec(TINY, "")
    with pytest.raises(FrozenInstanceError):
        spec.model.q_heads = 5  # type: ignore[misc]


def test_a_changed_copy_has_its_own_hash() -> None:
    spec = parse_spec(TINY, "")
    assert spec.hash != replace(spec, name="other").hash


def test_a_spec_and_its_errors_cross_process_boundaries() -> None:
    spec = parse_spec(TINY, "tiny.yaml")
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(SpecError) as caught:
        parse_spec("", "empty.yaml")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.problems, str(copy)) == (caught.value.problems, str(caught.value))


def check_report(text: str, error: SpecError) -> None:
    """Every problem is one printable line at a place that exists."""
    lines = re.split(r"\r\n|[\n\r\x85\u2028\u2029]", text)
    assert error.problems
    for problem in error.problems:
        assert str(problem).isprintable()
        assert all((problem.found, problem.allowed, problem.fix))
        if problem.line is not None and problem.column is not None:
            assert 1 <= problem.line <= len(lines)
            assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1


KEYS = ["name", "model", "serving", "targets", "q_heads", "kv_dtype", "page_size", "token_buckets", "<<", "?", ""]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*TARGETS, "bfloat16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
YAML_MARKS = [
    "\t",
    "\n",
    "---\n",
    "...\n",
    ": ",
    "- ",
    "? ",
    "[",
    "{",
    "]",
    "}",
    '"',
    "'",
    "#",
    "|",
    ">",
    "%YAML 3.0\n",
]
YAML_TRAPS = ["&a ", "*a", "!!int ", "!x ", "<<: ", "1:30", "0x10", "nan", ".nan", ".inf", "true", "~", "2024-01-01"]
ODD_TEXT = [
    "\x00",
    "\ud800",
    "\U0001f600",
    "\u2028",
    '"\\UFFFFFFFF"',
    "9" * 5000,
    "-1",
    "[" * 3000,
    "model:",
    "q_heads: 3",
]
TOKENS = st.sampled_from([*YAML_MARKS, *YAML_TRAPS, *ODD_TEXT])


@given(st.data())
def test_any_edit_of_a_spec_is_read_or_refused_with_a_report(data: st.DataObject) -> None:
    text = TINY
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + data.draw(TOKENS | st.text(max_size=4)) + text[end:]
    try:
        parse_spec(text, "edited.yaml")
    except SpecError as error:
        check_report(text, error)


@given(VALUES)
@example({"name": "x", "model": {}, "serving": {}, "targets": []})
def test_any_yaml_of_another_shape_is_refused_with_a_report(value: object) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "other.yaml")
    check_report(text, caught.value)


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_with_a_report(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(data)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert all(str(problem).isprintable() for problem in caught.value.problems)


INTS = st.integers(-2, 300) | st.sampled_from([2048, 8192, 2**31])


@given(
    st.fixed_dictionaries(
        {
            "model": st.fixed_dictionaries(
                {"q_heads": INTS, "kv_heads": INTS, "head_dim": st.sampled_from([64, 128, 256])}
            ),
            "serving": st.fixed_dictionaries(
                dict.fromkeys(("page_size", "max_model_len", "max_num_tokens", "max_num_seqs", "prefill_chunk"), INTS),
                optional={"num_pages": INTS, "token_buckets": st.lists(INTS), "context_lens": st.lists(INTS)},
            ),
        }
    )
)
@example(
    {
        "model": {"q_heads": 8, "kv_heads": 8, "head_dim": 256},
        "serving": {
            "page_size": 16,
            "max_model_len": 32,
            "max_num_tokens": 4,
            "max_num_seqs": 4,
            "prefill_chunk": 2,
            "context_lens": [1],
        },
    }
)
def test_a_spec_that_is_accepted_keeps_every_promise(data: dict[str, dict[str, object]]) -> None:
    data["model"].update(q_dtype="float32", kv_dtype="float32")
    text = yaml.safe_dump({"name": "x", "targets": ["cpu"], **data})
    try:
        spec = parse_spec(text, "random.yaml")
    except SpecError as error:
        check_report(text, error)
        return
    model, serving = spec.model, spec.serving
    assert model.q_heads == model.group * model.kv_heads and 1 <= model.group <= 16
    assert serving.max_model_len == serving.pages_per_seq * serving.page_size
    assert serving.num_pages >= serving.pages_per_seq >= 1
    assert list(serving.token_buckets) == sorted(set(serving.token_buckets))
    assert serving.token_buckets[-1] == serving.max_num_tokens
    assert 1 <= serving.max_num_seqs <= serving.max_num_tokens
    assert 1 <= serving.prefill_chunk <= min(serving.max_num_tokens, serving.max_model_len)
    assert all(1 <= length <= serving.max_model_len for length in serving.context_lens)
