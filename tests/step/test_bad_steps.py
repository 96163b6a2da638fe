"""What is wrong with a step is refused when it is built, with the place and the fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command import rpac

from rpac.errors import CompileError, SpecError
from rpac.files.store import Store
from rpac.step import StepTask
from rpac.step.checks import check_compiled, check_memory, check_traced
from rpac.step.worker import checked_functions, compile_step, lower_step, memory_of, step_of

TASK = Callable[..., StepTask]
HERE = Path(__file__).parent

TRACED = {
    "baked": r"bad_steps.py:\d+ \(baked\) holds 2,097,\d+ bytes of constants: float32\[2048, 128\] at \S*bad_steps.py:\d+:?\d* "
    r"\(baked\); .*; must hold at most 1,048,576: .* pass them in params or as an extra argument",
    "printing": r"bad_steps.py:\d+:?\d* \(printing\) calls the host \(debug_\w+\); must not: .*; return what you want to see",
    "reversed_caches": r"\(reversed_caches\) returns caches\[1\] in the place of caches\[0\]; must return each cache in its own",
    "one_cache_less": r"\(one_cache_less\): returns caches of the structure PyTreeDef\(\[\*\]\); must be that of its argument, "
    r"PyTreeDef\(\[\*, \*\]\)",
    "another_dtype": r"returns caches\[1\] as bfloat16\[12, 16, 2, 1, 128\]; must be float32\[12, 16, 2, 1, 128\], as it came",
    "no_pair": r"\(no_pair\): returns a \w*Tracer; must be two: `return outputs, caches`",
    "raising": r"KeyError: 'embeddings' at \S*bad_steps.py:\d+ \(return params\[\"embeddings\"\], caches\), "
    r"while \S*bad_steps.py:\d+ \(raising\) was traced",
    "own_class": r"\(own_class\): outputs is a Point; must be a dict, a list, a tuple or a named tuple",
    "wrong_query": r"BatchError: queries is float32\[16, 1, 128\]; must be float32\[16, 2, 128\]; .* at "
    r"\S*bad_steps.py:\d+ \(return attend",
    "unknown_layer": r"attend: layer is 'full'; must be one of '', the spec's kinds of layers at \S*bad_steps.py:\d+",
    "no_dict": r"bad_steps.py:\d+ \(no_dict_arrays\): returns a list; must be a dict with params and caches",
    "with_unknown": r"returns \['cache', 'caches', 'extra', 'params'\]; must be a dict with params and caches, and maybe extra",
    "no_array": r"params\['scale'\] is a int; must be a jax.ShapeDtypeStruct with a dtype of bool, ",
    "unknown_cache": r"`caches` is \"\['full', 'full'\]\"; must be an integer: the kind of layer of each cache",
    "bad_partition": r"params\['embedding'\] \[64, 128\] cannot be cut as P\w*\('model',?\); must name axes of the mesh "
    r"\(data 1, kv 1, copy 1\)",
}


@pytest.mark.parametrize("name", TRACED)
def test_what_a_trace_shows_is_refused_before_anything_compiles(task: TASK, name: str) -> None:
    with pytest.raises(CompileError, match=TRACED[name]):
        checked_functions([task(f"bad_steps:{name}")])


def test_what_no_server_would_take(task: TASK) -> None:
    calls = r"\(calling_out\) calls lapack_spotrf_ffi outside of the compiler; must call nothing there"
    with pytest.raises(CompileError, match=calls):
        lower_step(task("bad_steps:calling_out"), {}, Store(None))


def test_a_cache_that_is_read_after_it_was_updated_is_copied(task: TASK) -> None:
    step = step_of(task("bad_steps:old_cache"))
    assert step is not None
    check_traced(step)
    compiled = compile_step(step)
    with pytest.raises(CompileError) as raised:
        check_compiled(step, compiled, memory_of(compiled))
    assert re.search(
        r"the compiled step copies an array of the size of caches\[0\] \(.*\), 192 KiB; it is also read at \S*bad_steps.py:\d+.*"
        r"\(old_cache\); must copy no cache; pass each cache to attend once",
        str(raised.value),
    )


def test_a_step_that_does_not_fit_hbm(task: TASK) -> None:
    """Its arguments before the compile, and after it what the compiler counts."""
    small = task(target="tpu7x")
    step = step_of(small, on_topology=False)
    assert step is not None
    check_memory(step, {})
    need = r"needs parameters 1.31 MiB, caches 384 KiB, temporaries 200.00 GiB, outputs 1 KiB on each device; must fit the 94.75"
    with pytest.raises(CompileError, match=f"{need}.*; lower the largest of serving.token_buckets"):
        check_memory(step, {"temp_bytes": 200 << 30})
    [(layer, program)] = small.programs.items()
    args = tuple(one._replace(shape=(10**7, *one.shape[1:])) if one.name == "kv_cache" else one for one in program.args)
    large = step_of(replace(small, programs={layer: replace(program, args=args)}), on_topology=False)
    assert large is not None
    page = r"lower serving.num_pages \(a page of all caches has 32,768 bytes\)"
    with pytest.raises(CompileError, match=rf"caches 305\.\d+ GiB.*; {page}"):
        check_memory(large, {})


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("no_such_module:step", "found no_such_module:step, but there is no module 'no_such_module' in "),
        (
            "llama_step:no_such",
            r"llama_step.py has no function 'no_such' \(.*step.*\); must have it: the step; define it",
        ),
        (
            "bad_steps:not_described",
            "has no function 'not_described_arrays' .*: the function that describes its arrays",
        ),
        (
            "broken_module:step",
            r"cannot be imported: ZeroDivisionError: division by zero at \S*broken_module.py:3 \(VALUE",
        ),
    ],
)
def test_a_function_that_is_not_there(task: TASK, tmp_path: Path, function: str, text: str) -> None:
    (tmp_path / "broken_module.py").write_text('"""A module that cannot be imported."""\n\nVALUE = 1 / 0\n')
    folder = tmp_path if function.startswith("broken") else HERE
    with pytest.raises(SpecError, match=text):
        checked_functions([task(function, folder=folder)])


def test_steps_of_other_parameters_or_of_no_variant(task: TASK) -> None:
    with pytest.raises(CompileError, match="returns None for every kind and token bucket; must describe one or more"):
        checked_functions([task("bad_steps:never")])
    decode = task("bad_steps:changing")
    mixed = replace(decode, programs={"": replace(decode.first, kind="mixed")})
    with pytest.raises(
        CompileError, match="cpu step decode t16 takes its caches, and cpu step mixed t16 others; all steps must"
    ):
        checked_functions([decode, mixed])


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    done = rpac(
        "build", HERE / "llama-step.yaml", "--target", "cpu", "--step", "bad_steps:raising", "-o", tmp_path / "out",
        cache=tmp_path / "cache", cwd=HERE,
    )  # fmt: skip
    assert done.returncode == CompileError.exit_code
    assert "KeyError: 'embeddings' at " in done.stderr
    assert not [one for one in (tmp_path / "out").iterdir() if not one.name.startswith(".")]
    assert "compiling" not in done.stderr
