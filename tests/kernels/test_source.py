"""Sources: a pure function of spec and plan, standalone, and with nothing in them that the plan has no use for."""

from __future__ import annotations

import ast
import builtins
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rpac.contract.attention import Attention
from rpac.contract.program import Source
from rpac.kernels import render, templates_dir
from rpac.kernels.shared import of_kind
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec, load_spec, parse_spec

ROOT = Path(__file__).parents[2]
TINY = load_spec(ROOT / "specs" / "tiny.yaml")


def shaped(q_heads: int, kv_heads: int, head_dim: int, dtype: str) -> Spec:
    """tiny with another model."""
    return replace(TINY, model=Attention(q_heads, kv_heads, head_dim, dtype, dtype, 0.125))


SPECS = [
    *(part for path in sorted((ROOT / "specs").glob("*.yaml")) for part in load_spec(path).parts),
    shaped(9, 3, 128, "bfloat16"),
    shaped(4, 2, 256, "bfloat16"),
    shaped(4, 2, 128, "float32"),
    shaped(3, 1, 256, "float32"),
    shaped(16, 1, 128, "bfloat16"),
]
SEPARATE = replace(TINY, name="tiny-separate", serving=replace(TINY.serving, kv_layout="separate"))
CASES = [
    pytest.param(
        spec, plan, id=f"{spec.name}-{spec.model.q_heads}-{spec.model.kv_heads}-{spec.model.head_dim}-{plan.path}"
    )
    for spec, target in [*itertools.product(SPECS, ("tpu7x", "v5p", "cpu")), (SEPARATE, "tpu7x"), (SEPARATE, "cpu")]
    for plan in plan_spec(spec, target)
]
each_source = pytest.mark.parametrize(("spec", "plan"), CASES)


def plan_of(spec: Spec, target: str, kind: str) -> KernelPlan:
    return next(plan for plan in plan_spec(spec, target) if plan.kind == kind)


@each_source
def test_a_source_is_standalone(spec: Spec, plan: KernelPlan) -> None:
    """It is a module, and imports JAX and the standard library only."""
    tree = ast.parse(render(spec, plan).text)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - {"dataclasses", "functools"} == {"jax"}


@each_source
def test_everything_in_a_source_is_used_and_everything_used_is_there(spec: Spec, plan: KernelPlan) -> None:
    text = render(spec, plan).text
    tree = ast.parse(text)
    defined, used = set(), constants_in_words(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
            if node.decorator_list:  # the body of a `pl.when`
                used.add(node.name)
        elif isinstance(node, ast.alias):
            defined.add(node.asname or node.name.split(".")[-1])
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
    # Called from outside; operands whose memory is that of results.
    loose = {"ragged_paged_attention", "__init__", "cache_in", "out_in", "lse_in"}
    assert {name for name in defined - used - loose if not name.startswith("_")} <= unused_arguments(tree)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names <= defined | set(dir(builtins))


def constants_in_words(text: str) -> set[str]:
    """Constants that comments and docstrings name: shapes are written in them."""
    words = re.findall(r'#[^\n]*|""".*?"""', text, flags=re.DOTALL)
    return set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", " ".join(words)))


def unused_arguments(tree: ast.Module) -> set[str]:
    """Arguments that a signature holds because all of its kind have it: those of the program, and `lambda`s."""
    (program,) = (node for node in tree.body if getattr(node, "name", "") == "ragged_paged_attention")
    assert isinstance(program, ast.FunctionDef)
    return {argument.arg for argument in program.args.args}


@each_source
def test_a_source_is_clean_text(spec: Spec, plan: KernelPlan) -> None:
    text = render(spec, plan).text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "\n\n\n\n" not in text
    assert not any(mark in text for mark in ("{{", "}}", "{%", "%}", "\t", "\r"))


@each_source
def test_a_source_says_what_it_is_and_how_it_was_made(spec: Spec, plan: KernelPlan) -> None:
    source = render(spec, plan)
    header = ast.get_docstring(ast.parse(source.text))
    assert header is not None
    first, *rest = header.splitlines()
    of = f"{spec.name}, {spec.layer} layers" if spec.layer else spec.name
    assert first == f"Ragged paged attention of {of}: {plan.kind} batches on {plan.target}."
    assert "Do not edit" in header
    assert spec.hash in header
    assert f"rpac build SPEC --target {plan.target}\n" in header
    assert Path(spec.file).name not in header  # a spec under another name makes the same source
    assert f"token buckets that use it: {', '.join(map(str, plan.tokens))}" in header
    assert source.path == plan.path
    assert rest


def test_a_program_holds_the_kernels_of_its_kind_and_no_others() -> None:
    for target, own in {
        "tpu7x": {
            "decode": {"decode_kernel"},
            "prefill": {"prefill_kernel"},
            "mixed": {"decode_kernel", "mixed_kernel"},
        },
        "cpu": {"decode": {"attend_decode"}, "prefill": {"attend_blocks"}, "mixed": {"attend_decode", "attend_blocks"}},
    }.items():
        every = set.union(*own.values())
        for plan in plan_spec(TINY, target):
            tree = ast.parse(render(TINY, plan).text)
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert functions & every == own[plan.kind], plan.path


@pytest.mark.parametrize("kind", ["decode", "prefill", "mixed"])
def test_a_source_is_for_one_layout_of_the_cache_and_says_so_where_it_is_not_rpa_v3s(kind: str) -> None:
    interleaved, separate = (render(spec, plan_of(spec, "cpu", kind)) for spec in (TINY, SEPARATE))
    assert "kv_layout separate" in separate.text
    assert "layout" not in interleaved.text + separate.body
    assert interleaved.body != separate.body


def test_where_k_and_v_lie_apart_a_mixed_program_has_both_kernels_and_the_others_one() -> None:
    for kind, wanted in (("decode", ["decode"]), ("prefill", ["prefill"]), ("mixed", ["decode", "mixed"])):
        text = render(SEPARATE, plan_of(SEPARATE, "tpu7x", kind)).text
        functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        assert [name for name in functions if name.endswith("_kernel")] == [f"{kernel}_kernel" for kernel in wanted]
        assert [name for name in functions if name.startswith("attend_")] == [f"attend_{kernel}" for kernel in wanted]
        assert text.count("pl.pallas_call(") == len(wanted)
        for other in ("cache_rows", "pack_token", "words_as_rows"):
            assert other not in text, "of the interleaved layout"


def test_a_page_table_that_ends_within_a_tile_is_not_read_past_its_end() -> None:
    def clamped(pages: int) -> bool:
        serving = replace(SEPARATE.serving, max_model_len=pages * SEPARATE.serving.page_size)
        spec = replace(SEPARATE, serving=serving)
        text = render(spec, plan_of(spec, "tpu7x", "decode")).text
        return "jnp.minimum(entry + page, LAST_ENTRY)" in text and "LAST_ENTRY = MAX_SEQS * PAGES_PER_SEQ - 1" in text

    assert not clamped(32)
    assert clamped(33)


def test_the_same_spec_gives_the_same_bytes_wherever_its_file_is() -> None:
    text = (ROOT / "specs" / "tiny.yaml").read_text()
    one, other = parse_spec(text, "specs/tiny.yaml"), parse_spec("# a comment\n" + text, "/elsewhere/tiny.yaml")
    for target in TINY.targets:
        for plan, again in zip(plan_spec(one, target), plan_spec(other, target), strict=True):
            assert render(one, plan) == render(other, again)


def test_targets_whose_plans_agree_have_one_body_and_the_body_is_all_but_the_header() -> None:
    one, other = (render(TINY, plan_of(TINY, target, "mixed")) for target in ("tpu7x", "v6e"))
    assert one.text != other.text
    assert one.body == other.body
    assert one.text.endswith(one.body)
    assert one.body.lstrip().startswith("import ")
    decode = render(TINY, plan_of(TINY, "tpu7x", "decode"))
    assert decode.body != one.body


def test_a_hash_is_of_the_whole_text() -> None:
    source = render(TINY, plan_of(TINY, "tpu7x", "decode"))
    assert len(source.sha256) == 64
    assert Source(source.path, source.text + "#").sha256 != source.sha256


def test_every_buffer_of_a_plan_is_declared_and_a_parameter_once() -> None:
    for spec, kind in itertools.product((TINY, SEPARATE), ("decode", "prefill")):
        plan = plan_of(spec, "tpu7x", kind)
        tiles = plan.decode or plan.block
        assert tiles is not None
        text = render(spec, plan).text
        fields = re.findall(r"^    (\w+): Ref  # \w+\[.*\]: (.*)$", text, flags=re.MULTILINE)
        notes = [note for _, note in fields if not note.startswith("the memory of")]
        declared = re.findall(r"^            pltpu\..*,  # (\w+)$", text, flags=re.MULTILINE)
        buffers = of_kind(kind, tiles.scratch(spec, plan.recipe))  # type: ignore[union-attr]
        assert notes == [buffer.note for buffer in buffers]
        assert declared == [name for name, note in fields if not note.startswith("the memory of")]


def test_templates_are_found_beside_the_package_in_a_checkout() -> None:
    assert (templates_dir() / "pallas_tpu" / "program.py.jinja").is_file()
    assert (templates_dir() / "xla" / "skeletons" / "decode.py.jinja").is_file()
