"""Arrays that an adapter is given: those that the bundle was not built for are refused with the lines that build for them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from calling import NAMES, call
from fake import ADAPTERS, FakeEngine, arguments

from rpac.adapters import tpu_inference
from rpac.errors import BatchError, SelectionError
from rpac.spec import Spec, parse_spec

# A key of the spec, and another value of it that a server may have.
SIZES = [
    ("model", "q_heads", 8),
    ("model", "kv_heads", 4),
    ("model", "head_dim", 256),
    ("model", "q_dtype", "float32"),
    ("serving", "page_size", 32),
    ("serving", "max_model_len", 256),
    ("serving", "max_num_seqs", 7),
    ("serving", "num_pages", 99),
]


def with_lines(tiny: Spec, *lines: dict[str, dict[str, Any]]) -> Spec:
    """The spec with some lines replaced."""
    data = yaml.safe_load(tiny.source)
    for each in lines:
        for section, keys in each.items():
            data[section].update(keys)
    return parse_spec(yaml.safe_dump(data), "changed.yaml")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("section", "key", "value"), SIZES, ids=str)
def test_arrays_of_another_size_are_refused_with_the_lines_that_build_for_them(
    name: str, section: str, key: str, value: Any, tiny: Spec
) -> None:
    if name.startswith("sglang") and key == "max_model_len":
        return  # its page lists have no fixed length
    more = {"kv_dtype": value} if key == "q_dtype" else {}
    server = FakeEngine.of(with_lines(tiny, {section: {key: value, **more}}))
    built = FakeEngine.of(tiny)
    with pytest.raises(SelectionError) as raised:
        call(name, built, *arguments(name, server))
    message = str(raised.value)
    assert f"{key} of " in message
    assert f" is {value}, must be " in message
    advised = FakeEngine.of(with_lines(tiny, yaml.safe_load(message[message.index("\n") :])))
    call(name, advised, *arguments(name, server), **{ADAPTERS[name].scale: advised.model.sm_scale})
    assert len(advised.calls) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("at", "dtype", "key"),
    [
        (3, jnp.float16, "kv_dtype of kv_cache"),
        (3, jnp.int32, "kv_dtype of kv_cache"),
        (0, jnp.int8, "q_dtype of queries"),
    ],
)
def test_arrays_of_a_dtype_that_no_spec_has_are_refused_without_lines(name: str, at: int, dtype: Any, key: str) -> None:
    engine = FakeEngine()
    args = list(arguments(name, engine))
    args[at] = args[at].astype(dtype)
    words = f"{key} is {jnp.dtype(dtype).name}, .*; no line of a spec adds that dtype; convert the arrays$"
    with pytest.raises(SelectionError, match=words):
        call(name, engine, *args)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_other_axes_are_refused(name: str) -> None:
    engine = FakeEngine()
    names = list(inspect.signature(ADAPTERS[name].make(engine)).parameters)
    for at, array in enumerate(arguments(name, engine)):
        if array is None:
            continue
        for wrong in (np.asarray(array)[None], [1, 2]):
            args = list(arguments(name, engine))
            args[at] = wrong
            with pytest.raises(BatchError, match=r"must be an array of \d axes"):
                call(name, engine, *args)
        assert engine.calls == [], names[at]


def test_a_size_of_the_servers_scale_keeps_the_engines_own_refusals(bundle: Path) -> None:
    import rpac

    engine = rpac.load(bundle, target="cpu")
    args = list(arguments("tpu_inference", engine))
    attention = tpu_inference.ragged_paged_attention(engine)
    args[0], args[1], args[2] = (array[:5] for array in args[:3])
    with pytest.raises(SelectionError, match="queries have 5 rows; the token buckets built are 8, 32"):
        attention(*args, sm_scale=engine.model.sm_scale)


@pytest.mark.parametrize("name", NAMES)
def test_inside_a_trace_the_engine_is_called_as_traced(name: str) -> None:
    engine = FakeEngine()
    args = arguments(name, engine)
    call(name, engine, *args)
    jax.eval_shape(lambda *given: call(name, engine, *given), *args)
    one = list(args)  # a single tracer is enough, wherever it is
    jax.eval_shape(lambda lens: call(name, engine, *one[:4], lens, *one[5:]), args[4])
    assert [len(engine.calls), len(engine.traces)] == [1, 2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("validate", [True, False])
def test_validation_of_the_metadata_can_be_left_out(name: str, validate: bool) -> None:
    engine = FakeEngine()
    ADAPTERS[name].make(engine, validate=validate)(
        *arguments(name, engine), **{ADAPTERS[name].scale: engine.model.sm_scale}
    )
    assert engine.validated == [validate]
