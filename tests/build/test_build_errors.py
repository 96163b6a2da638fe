"""A build that cannot be done says what is too large, by how much, and what to change."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from command import rpac

from rpac.build import chosen_targets, sources_of
from rpac.devices.chip import TPU_TARGETS
from rpac.devices.toolchain import toolchain
from rpac.errors import CompileError, PlanError, TargetError
from rpac.kernels import render, slots, templates_dir
from rpac.lower import Cache, Task, lower_all, tasks_of
from rpac.lower import worker as lowering
from rpac.plan import plan_spec
from rpac.spec import Spec, parse_spec

SPEC = """\
name: large
model:
  q_heads: 32
  kv_heads: 8
  head_dim: 128
  q_dtype: bfloat16
  kv_dtype: bfloat16
serving:
  page_size: 16
  max_model_len: 131072
  max_num_tokens: 256
  max_num_seqs: 64
  num_pages: 8192
  prefill_chunk: 64
  context_lens: [1024]
targets: [tpu7x, v6e, v5p, v5e, cpu]
"""


# What is to be written instead of so many heads, with pages of 256 tokens.
DEVICES = {
    128: "`parallel: {tensor: 8}`",
    1024: "`parallel: {tensor: 16}` and `page_size: 32` and `num_pages: 65536`, which is as many tokens",
}


def spec_with(**values: int) -> Spec:
    text = SPEC
    for name, value in values.items():
        text, count = re.subn(rf"\b{name}: \d+", f"{name}: {value}", text)
        assert count == 1, name
    return parse_spec(text, "large.yaml")


def number(pattern: str, message: str) -> int:
    match = re.search(pattern, message)
    assert match is not None, f"{pattern!r} is not in {message!r}"
    return int(match[1].replace(",", ""))


@pytest.mark.parametrize("target", TPU_TARGETS)
@pytest.mark.parametrize("heads", [128, 1024])
def test_heads_too_large_for_vmem_name_the_need_and_the_limit_and_what_to_write(target: str, heads: int) -> None:
    spec = spec_with(q_heads=heads, kv_heads=heads, head_dim=256, page_size=256, max_num_seqs=4)
    with pytest.raises(PlanError) as raised:
        plan_spec(spec, target)
    message = str(raised.value)
    assert re.match(rf"large\.yaml: no (decode|prefill) kernel fits {target}: ", message)
    need, limit = number(r"needs ([\d,]+) bytes of VMEM or more", message), number(r"and ([\d,]+) are usable", message)
    assert need > limit
    assert f"{heads} KV heads, page_size 256" in message
    assert message.endswith(f"; write {DEVICES[heads]}")


@pytest.mark.parametrize("command", ["plan", "build"])
def test_a_plan_error_is_exit_2_with_nothing_compiled_or_written(command: str, tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(spec_with(q_heads=128, kv_heads=128, head_dim=256, page_size=256, max_num_seqs=4).source)
    done = rpac(command, file, "--target", "v5e", cache=tmp_path / "cache", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    *progress, error = done.stderr.splitlines()
    assert error.startswith(f"rpac: PlanError: {file}: no ")
    assert " kernel fits v5e: on each device it needs " in error
    assert [line.split("s  ")[1] for line in progress] == (
        ["large: planning the kernels for v5e"] if command == "build" else []
    )
    assert list(tmp_path.iterdir()) == [file]


def test_targets_that_the_spec_does_not_list_are_refused_by_name() -> None:
    spec = dataclasses.replace(spec_with(), targets=("v6e", "cpu"))
    assert chosen_targets(spec, []) == ("v6e", "cpu")
    assert chosen_targets(spec, ["cpu", "cpu"]) == ("cpu",)
    with pytest.raises(TargetError, match=r"large\.yaml: target 'v5e' is not in the spec, which has v6e, cpu; add it"):
        chosen_targets(spec, ["cpu", "v5e"])


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the templates, which the test may break."""
    copy = tmp_path / "templates"
    shutil.copytree(templates_dir(), copy)
    monkeypatch.setattr(slots, "templates_dir", lambda: copy)
    slots.environment.cache_clear()
    yield copy
    slots.environment.cache_clear()


@pytest.mark.parametrize("bug", ["{{ no_such_name }}", "{{ kind.no_such_name }}", "{% if no_such_name %}x{% endif %}"])
@pytest.mark.parametrize("target", ["v6e", "cpu"])
def test_an_undefined_name_in_a_template_is_an_error_when_it_is_rendered(
    tiny: Spec, templates: Path, target: str, bug: str
) -> None:
    assert sources_of(tiny, [target])
    slots.environment.cache_clear()
    for file in templates.glob("*/skeletons/decode*.py.jinja"):
        file.write_text(f"{file.read_text()}\n{bug}\n")
    with pytest.raises(jinja2.UndefinedError, match="no_such"):
        sources_of(tiny, [target])


def task_of(spec: Spec, text: str) -> Task:
    """The smallest decode program for cpu, of another source."""
    task = next(task for task in tasks_of(spec, sources_of(spec, ["cpu"])) if task.kind == "decode")
    return dataclasses.replace(task, source=dataclasses.replace(task.source, text=text))


PROGRAM = "def ragged_paged_attention(queries, keys, values, kv_cache, *_):\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{PROGRAM}    return queries @ keys, kv_cache\n", r"TypeError from the compiler:\n  \S"),
        (f"{PROGRAM}    raise ValueError('two\\nlines')\n", r"ValueError from the compiler:\n  two\n  lines"),
        (f"{PROGRAM}    assert False\n", r"AssertionError from the compiler:\n  AssertionError"),
        (f"{PROGRAM}    import os; os._exit(9)\n", "a compiling process died; .* fewer --jobs"),
    ],
    ids=["shapes", "several lines", "no message", "the process dies"],
)
def test_what_a_worker_meets_is_a_compile_error_of_its_variant(tiny: Spec, text: str, message: str) -> None:
    task = task_of(tiny, text)
    with pytest.raises(CompileError, match=rf"^cpu decode t{task.tokens}: {message}") as raised:
        lower_all([task], Cache(None), 1)
    assert raised.value.exit_code == 3


def test_what_was_compiled_before_an_error_is_kept(tiny: Spec, tmp_path: Path) -> None:
    sound = task_of(tiny, f"{PROGRAM}    return queries, kv_cache\n")
    broken = task_of(tiny, f"{PROGRAM}    raise ValueError\n")
    with pytest.raises(CompileError):
        lower_all([sound, broken], Cache(tmp_path), 1)
    assert Cache(tmp_path).get(sound, toolchain()) is not None
    assert Cache(tmp_path).get(broken, toolchain()) is None


IN_PLACE = "HloModule m, input_output_alias={ {1}: (3, {}, may-alias) }, entry"


@pytest.mark.parametrize(
    ("text", "aliased", "temporary", "message"),
    [
        (IN_PLACE, -1, 0, "does not update the cache in place"),
        (IN_PLACE, 0, 0, None),
        (IN_PLACE, 0, -1, None),
        (IN_PLACE, 0, "cache", "does not update the cache in place"),
        (IN_PLACE.replace("{1}", "{0}"), 0, 0, "argument 3 of the compiled program is not the memory of its result 1"),
        (IN_PLACE.replace("(3", "(2"), 0, 0, "argument 3 of the compiled program is not the memory of its result 1"),
        ("HloModule m, entry", 0, 0, "argument 3"),
    ],
)
def test_a_compiled_program_must_update_the_cache_in_place(
    tiny: Spec, text: str, aliased: int, temporary: int | str, message: str | None
) -> None:
    """`aliased` and a negative `temporary` are relative to the cache's bytes."""
    task = task_of(tiny, "")
    cache = task.args[3].nbytes
    temp = cache if temporary == "cache" else int(temporary) % cache
    memory = SimpleNamespace(alias_size_in_bytes=cache + aliased, temp_size_in_bytes=temp)
    if message is None:
        assert lowering._aliases(task, text, memory) == {"kv_cache": 1}
    else:
        with pytest.raises(CompileError, match=message):
            lowering._aliases(task, text, memory)


def test_a_plan_is_rendered_with_the_limit_that_the_error_would_name(tiny: Spec) -> None:
    """The number in the message is the one in the source."""
    plan = next(plan for plan in plan_spec(tiny, "v6e") if plan.kind == "decode")
    assert f"VMEM_LIMIT = {plan.vmem_limit}" in render(tiny, plan).text
