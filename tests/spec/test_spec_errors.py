"""What a wrong spec is told: the whole line, place, value, rule and fix."""

# A case a line, however long its message is.
# ruff: noqa: E501

from __future__ import annotations

from pathlib import Path

import pytest

from rpac.errors import RpacError, SpecError
from rpac.spec import load_spec, parse_spec
from rpac.spec.parse import MODEL_KEYS, SERVING_KEYS

MODEL, SERVING = ", ".join(MODEL_KEYS), ", ".join(SERVING_KEYS)

GOOD = """\
name: tiny
model:
  q_heads: 4
  kv_heads: 2
  head_dim: 128
  q_dtype: bfloat16
  kv_dtype: bfloat16
serving:
  page_size: 16
  max_model_len: 128
  max_num_tokens: 32
  token_buckets: [8, 32]
  max_num_seqs: 4
  prefill_chunk: 16
  context_lens: [40, 100]
targets: [tpu7x, cpu]
"""
DTYPES = "must be one of bfloat16, float32"
LAYOUTS = "must be one of interleaved, separate"
TARGETS = "must be one of tpu7x, v6e, v5p, v5e, cpu, gpu"
NAME = "must be lower-case letters, digits, dots and dashes, 64 at most, a letter or digit first"
HEADS = "must be an integer from 1 to 1024"
TOKENS = "must be an integer from 1 to 1048576"
SCALE = "must be a number from 1e-06 to 1e+06"


def report(text: str) -> list[str]:
    """The lines that a spec is refused with."""
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "x.yaml")
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert lines == [str(problem) for problem in caught.value.problems]
    return lines


def test_the_good_spec_of_these_tests_is_good() -> None:
    parse_spec(GOOD, "x.yaml")


ONE_EDIT = {
    # impossible combinations
    "heads off": ("q_heads: 4", "q_heads: 5", "3:12: model.q_heads: found 5; must be a multiple of kv_heads (2); write 4 or change kv_heads"),
    "fewer q heads": ("q_heads: 4", "q_heads: 1", "3:12: model.q_heads: found 1; must be a multiple of kv_heads (2); write 2 or change kv_heads"),
    "group too large": ("q_heads: 4", "q_heads: 64", "3:12: model.q_heads: found 64; must be at most 16 times kv_heads (2); write 32 or less, or change kv_heads"),
    "dtypes differ": ("kv_dtype: bfloat16", "kv_dtype: float32", "7:13: model.kv_dtype: found float32; must equal q_dtype (bfloat16) or be one of float8_e4m3fn, float8_e5m2, int8; write bfloat16"),
    "scale of what is not quantized": ("kv_dtype: bfloat16", "kv_dtype: bfloat16\n  kv_scale: head", "8:13: model.kv_scale: found head; must be left out with kv_dtype bfloat16, which is stored unchanged; remove it, or write `kv_dtype: float8_e4m3fn`"),
    "quantizer of nothing": ("kv_dtype: bfloat16", "kv_dtype: bfloat16\n  quantize: kernel", "8:13: model.quantize: found kernel; must be left out with kv_dtype bfloat16, which is stored unchanged; remove it, or write `kv_dtype: float8_e4m3fn`"),
    "scale misspelt": ("kv_dtype: bfloat16", "kv_dtype: int8\n  kv_scale: heads", "8:13: model.kv_scale: found heads; must be one of tensor, head; write head"),
    "quantizer unknown": ("kv_dtype: bfloat16", "kv_dtype: int8\n  quantize: server", "8:13: model.quantize: found server; must be one of caller, kernel; write one of them"),
    "8-bit queries": ("q_dtype: bfloat16", "q_dtype: int8", f"6:12: model.q_dtype: found int8; {DTYPES}; write one of them"),
    "page less than a register, apart": ("page_size: 16", "page_size: 8\n  kv_layout: separate", "9:14: serving.page_size: found 8; must be at least 16 with kv_layout separate and kv_dtype bfloat16: that many tokens share a register; write 16, or `kv_layout: interleaved`"),
    "buckets end low": ("[8, 32]", "[8, 16]", "12:18: serving.token_buckets: found 16 at its end; must end in max_num_tokens (32); write [8, 16, 32]"),
    "buckets end high": ("[8, 32]", "[8, 64]", "12:18: serving.token_buckets: found 64 at its end; must end in max_num_tokens (32); write [8, 32]"),
    "buckets descend": ("[8, 32]", "[32, 8]", "12:23: serving.token_buckets[1]: found 8; must be above the 32 before it; sort the list"),
    "bucket twice": ("[8, 32]", "[32, 32]", "12:23: serving.token_buckets[1]: found 32; must be above the 32 before it; sort the list and drop repeats"),
    "decode impossible": ("max_num_seqs: 4", "max_num_seqs: 40", "13:17: serving.max_num_seqs: found 40; must be at most max_num_tokens (32): decode takes a token of every sequence; write 32 or raise max_num_tokens"),
    "chunk above tokens": ("chunk: 16", "chunk: 33", "14:18: serving.prefill_chunk: found 33; must be at most max_num_tokens (32); write 32 or raise max_num_tokens"),
    "context too long": ("[40, 100]", "[40, 200]", "15:17: serving.context_lens: found 200 at its end; must be at most max_model_len (128); remove what is above it, or raise max_model_len"),
    "length off page": ("max_model_len: 128", "max_model_len: 130", "10:18: serving.max_model_len: found 130; must be a multiple of page_size (16); write 144"),
    "cache too small": ("chunk: 16", "chunk: 16\n  num_pages: 7", "15:14: serving.num_pages: found 7; must be at least 8, the pages of one sequence of max_model_len; write 8 or lower max_model_len"),
    "cache too large": ("chunk: 16", "chunk: 16\n  num_pages: 2000000000", "15:14: serving.num_pages: found 2000000000; must be at most 134217727, so that int32 can count the cache's tokens; write `num_pages: 134217727` or less"),
    "too many devices": ("name: tiny", "name: tiny\nparallel: {tensor: 8, data: 8}", "2:29: parallel.data: found 8; must be at most 32 devices with tensor (8); write 4 or less: replicas need not share a program"),
    "tensor of none": ("name: tiny", "name: tiny\nparallel: {tensor: 0}", "2:20: parallel.tensor: found 0; must be an integer from 1 to 32; write 1 or more"),
    "parallel unknown": ("name: tiny", "name: tiny\nparallel: {pipeline: 2}", "2:12: parallel.pipeline: found an unknown key; must be one of tensor, data; remove it"),
    # values out of range or of another type
    "head_dim": ("head_dim: 128", "head_dim: 72", "5:13: model.head_dim: found 72; must be 64, 80, 96, 112, 128, 192 or 256; write 80 and `sm_scale: 0.11785113019775792`, and pad queries, keys and values with zeros"),
    "head_dim with a scale": ("head_dim: 128", "head_dim: 240\n  sm_scale: 0.1", "5:13: model.head_dim: found 240; must be 64, 80, 96, 112, 128, 192 or 256; write 256, and pad queries, keys and values with zeros"),
    "head_dim too large": ("head_dim: 128", "head_dim: 512", "5:13: model.head_dim: found 512; must be 64, 80, 96, 112, 128, 192 or 256; serve this model without rpac, which has no kernels for longer heads"),
    "page_size": ("page_size: 16", "page_size: 100", "9:14: serving.page_size: found 100; must be 8, 16, 32, 64, 128, 256 or 512; write 128"),
    "zero": ("q_heads: 4", "q_heads: 0", f"3:12: model.q_heads: found 0; {HEADS}; write 1 or more"),
    "negative": ("q_heads: 4", "q_heads: -4", f"3:12: model.q_heads: found -4; {HEADS}; write 1 or more"),
    "large": ("q_heads: 4", "q_heads: 4000", f"3:12: model.q_heads: found 4000; {HEADS}; write 1024 or less"),
    "huge": ("q_heads: 4", "q_heads: " + "9" * 5000, f"3:12: model.q_heads: found {'9' * 40}...; {HEADS}; write 1024 or less"),
    "hugely negative": ("q_heads: 4", "q_heads: -" + "9" * 5000, f"3:12: model.q_heads: found -{'9' * 39}...; {HEADS}; write 1 or more"),
    "quoted number": ("q_heads: 4", 'q_heads: "4"', f"3:12: model.q_heads: found the text '4'; {HEADS}; write 4 without quotes or tag"),
    "bool": ("q_heads: 4", "q_heads: true", f"3:12: model.q_heads: found true (a bool); {HEADS}; write it in plain decimal digits"),
    "yes": ("q_heads: 4", "q_heads: yes", f"3:12: model.q_heads: found yes (a bool); {HEADS}; write it in plain decimal digits"),
    "float": ("q_heads: 4", "q_heads: 4.0", f"3:12: model.q_heads: found 4.0; {HEADS}; write it in plain decimal digits"),
    "octal": ("q_heads: 4", "q_heads: 010", f"3:12: model.q_heads: found 010; {HEADS}; write it in plain decimal digits"),
    "hex": ("q_heads: 4", "q_heads: 0x4", f"3:12: model.q_heads: found 0x4; {HEADS}; write it in plain decimal digits"),
    "underscores": ("q_heads: 4", "q_heads: 1_0", f"3:12: model.q_heads: found 1_0; {HEADS}; write it in plain decimal digits"),
    "sexagesimal": ("q_heads: 4", "q_heads: 1:04", f"3:12: model.q_heads: found 1:04; {HEADS}; write it in plain decimal digits"),
    "null": ("q_heads: 4", "q_heads:", f"3:11: model.q_heads: found nothing (null); {HEADS}; write it in plain decimal digits"),
    "a list": ("q_heads: 4", "q_heads: [4]", f"3:12: model.q_heads: found a list; {HEADS}; write it in plain decimal digits"),
    "a mapping": ("q_heads: 4", "q_heads: {a: 4}", f"3:12: model.q_heads: found a mapping; {HEADS}; write it in plain decimal digits"),
    "a python tag": ("q_heads: 4", "q_heads: !!python/object:os.system 4", f"3:12: model.q_heads: found 4 (tagged tag:yaml.org,2002:python/object:os.syste...); {HEADS}; write 4 without quotes or tag"),
    "nan": ("q_heads: 4", "sm_scale: .nan\n  q_heads: 4", f"3:13: model.sm_scale: found .nan; {SCALE}; write a number in that range, unquoted"),
    "infinite": ("q_heads: 4", "sm_scale: .inf\n  q_heads: 4", f"3:13: model.sm_scale: found .inf; {SCALE}; write a number in that range, unquoted"),
    "overflow": ("q_heads: 4", "sm_scale: 1e999\n  q_heads: 4", f"3:13: model.sm_scale: found 1e999; {SCALE}; write a number in that range, unquoted"),
    "zero scale": ("q_heads: 4", "sm_scale: 0.0\n  q_heads: 4", f"3:13: model.sm_scale: found 0.0; {SCALE}; write a number in that range, unquoted"),
    "quoted scale": ("q_heads: 4", "sm_scale: '0.1'\n  q_heads: 4", f"3:13: model.sm_scale: found the text '0.1'; {SCALE}; write a number in that range, unquoted"),
    "dtype alias": ("  q_dtype: bfloat16", "  q_dtype: bf16", f"6:12: model.q_dtype: found bf16; {DTYPES}; write bfloat16"),
    "dtype unknown": ("  q_dtype: bfloat16", "  q_dtype: complex", f"6:12: model.q_dtype: found complex; {DTYPES}; write one of them"),
    "dtype number": ("  q_dtype: bfloat16", "  q_dtype: 16", f"6:12: model.q_dtype: found 16; {DTYPES}; write one of them"),
    "dtype list": ("  q_dtype: bfloat16", "  q_dtype: [bfloat16]", f"6:12: model.q_dtype: found a list; {DTYPES}; write one of them"),
    "soft cap": ("q_heads: 4", "soft_cap: 0\n  q_heads: 4", "3:13: model.soft_cap: found 0; must be a number from 0.001 to 1e+06; write a number in that range, unquoted"),
    "soft cap off": ("q_heads: 4", "soft_cap: null\n  q_heads: 4", "3:13: model.soft_cap: found nothing (null); must be a number from 0.001 to 1e+06; write a number in that range, unquoted"),
    "window": ("q_heads: 4", "sliding_window: 0\n  q_heads: 4", "3:19: model.sliding_window: found 0; must be an integer from 1 to 1048576; write 1 or more"),
    "window of no use": ("q_heads: 4", "sliding_window: 128\n  q_heads: 4", "3:19: model.sliding_window: found 128; must be below serving.max_model_len (128): a window that long hides nothing; remove it"),
    "chunk of no use": ("q_heads: 4", "attention_chunk: 128\n  q_heads: 4", "3:20: model.attention_chunk: found 128; must be below serving.max_model_len (128): no sequence has a second chunk; remove it, or raise max_model_len"),
    "chunk of a part of a page": ("q_heads: 4", "attention_chunk: 40\n  q_heads: 4", "3:20: model.attention_chunk: found 40; must be a multiple of serving.page_size (16), 16 at least: a chunk begins with a page; write 32"),
    "chunk shorter than a page": ("q_heads: 4", "attention_chunk: 8\n  q_heads: 4", "3:20: model.attention_chunk: found 8; must be a multiple of serving.page_size (16), 16 at least: a chunk begins with a page; write 16"),
    "chunk and window": ("q_heads: 4", "attention_chunk: 32\n  sliding_window: 64\n  q_heads: 4", "3:20: model.attention_chunk: found 32; must be left out with sliding_window, and with causal false: a query can have only one mask; remove one of the two"),
    "chunk that looks ahead": ("q_heads: 4", "attention_chunk: 32\n  causal: false\n  q_heads: 4", "3:20: model.attention_chunk: found 32; must be left out with sliding_window, and with causal false: a query can have only one mask; remove one of the two"),
    "biases that look ahead": ("q_heads: 4", "alibi: true\n  causal: false\n  q_heads: 4", "3:10: model.alibi: found true (a bool); must be false with causal false: a bias counts the tokens back from a query; remove one of the two"),
    "nothing to quantize": ("  kv_dtype: bfloat16", "  kv_dtype: int8\n  quantize: kernel\n  update_cache: false", "8:13: model.quantize: found kernel; must be left out with update_cache false: there is nothing to quantize; remove one of the two"),
    "sinks": ("q_heads: 4", "sinks: yes\n  q_heads: 4", "3:10: model.sinks: found yes (a bool); must be true or false; write one of them, unquoted"),
    "sinks a number": ("q_heads: 4", "sinks: 1\n  q_heads: 4", "3:10: model.sinks: found 1; must be true or false; write one of them, unquoted"),
    "sinks quoted": ("q_heads: 4", "sinks: 'true'\n  q_heads: 4", "3:10: model.sinks: found the text 'true'; must be true or false; write one of them, unquoted"),
    "causal": ("q_heads: 4", "causal: no\n  q_heads: 4", "3:11: model.causal: found no (a bool); must be true or false; write one of them, unquoted"),
    "window that looks ahead": ("q_heads: 4", "causal: false\n  sliding_window: 64\n  q_heads: 4", "3:11: model.causal: found false (a bool); must be true with sliding_window: a window looks back from a query, not ahead; remove one of the two"),
    "lse": ("page_size: 16", "page_size: 16\n  log_sum_exp: 1", "10:16: serving.log_sum_exp: found 1; must be true or false; write one of them, unquoted"),
    "layout misspelt": ("page_size: 16", "page_size: 16\n  kv_layout: seperate", f"10:14: serving.kv_layout: found seperate; {LAYOUTS}; write separate"),
    "layout unknown": ("page_size: 16", "page_size: 16\n  kv_layout: BHSD", f"10:14: serving.kv_layout: found BHSD; {LAYOUTS}; write one of them"),
    "layout nothing": ("page_size: 16", "page_size: 16\n  kv_layout:", f"10:13: serving.kv_layout: found nothing (null); {LAYOUTS}; write one of them"),
    "layout of the model": ("q_heads: 4", "q_heads: 4\n  kv_layout: separate", f"4:3: model.kv_layout: found an unknown key; must be one of {MODEL}; move it under serving"),
    "bucket type": ("[8, 32]", "[8, x]", f"12:22: serving.token_buckets[1]: found x; {TOKENS}; write it in plain decimal digits"),
    "buckets empty": ("[8, 32]", "[]", "12:18: serving.token_buckets: found an empty list; must be a list of integers from 1 to 1048576, ascending; write [32]"),
    "buckets no list": ("[8, 32]", "32", "12:18: serving.token_buckets: found 32; must be a list of integers from 1 to 1048576, ascending; write [32]"),
    "name upper case": ("name: tiny", "name: Tiny", f"1:7: name: found Tiny; {NAME}; write my-model"),
    "name a number": ("name: tiny", "name: 8", f'1:7: name: found 8; {NAME}; write "8"'),
    "name a path": ("name: tiny", "name: ../tiny", f"1:7: name: found ../tiny; {NAME}; write my-model"),
    "name empty": ("name: tiny", 'name: ""', f"1:7: name: found the text ''; {NAME}; write my-model"),
    "name odd": ("name: tiny", "name: tin\u00ff", f"1:7: name: found 'tin\u00ff'; {NAME}; write my-model"),
    "name too long": ("name: tiny", "name: " + "a" * 65, f"1:7: name: found {'a' * 40}...; {NAME}; write my-model"),
    "target unknown": ("cpu]", "tpu7]", f"16:18: targets[1]: found tpu7; {TARGETS}; write tpu7x"),
    "target twice": ("cpu]", "tpu7x]", "16:18: targets[1]: found tpu7x a second time; must be listed once; remove it"),
    "bytes in rows of two registers": ("head_dim: 128\n  q_dtype: bfloat16\n  kv_dtype: bfloat16", "head_dim: 192\n  q_dtype: bfloat16\n  kv_dtype: int8", "9:3: serving.kv_layout: found interleaved, its default; must be separate with kv_dtype int8 and head_dim above 128 on a TPU: the compiler would copy an 8-bit cache, to view each row of two registers as one row; write `kv_layout: separate`"),
    "target of no topology": ("[tpu7x, cpu]", "[v4, cpu]", f"16:11: targets[0]: found v4; {TARGETS}; leave it out: a v4 chip serves as one device with two cores, but without a chip libtpu describes it only as two devices with one core each, so no executable built here would load"),
    "targets empty": ("[tpu7x, cpu]", "[]", "16:10: targets: found an empty list; must be a list of tpu7x, v6e, v5p, v5e, cpu, gpu; write [tpu7x, cpu]"),
    "targets a word": ("[tpu7x, cpu]", "cpu", "16:10: targets: found cpu; must be a list of tpu7x, v6e, v5p, v5e, cpu, gpu; write [tpu7x, cpu]"),
    # keys
    "key misspelt": ("q_heads: 4", "q_head: 4", f"3:3: model.q_head: found an unknown key; must be one of {MODEL}; write q_heads"),
    "key unknown": ("q_heads: 4", "q_heads: 4\n  color: red", f"4:3: model.color: found an unknown key; must be one of {MODEL}; remove it"),
    "key of another meaning": ("q_heads: 4", "q_heads: 4\n  q_scale: 0.5", f"4:3: model.q_scale: found an unknown key; must be one of {MODEL}; remove it and multiply the queries, or multiply model.sm_scale by it"),
    "key of a server": ("page_size: 16", "page_size: 16\n  max_num_batched_tokens: 32", f"10:3: serving.max_num_batched_tokens: found an unknown key; must be one of {SERVING}; write it as serving.max_num_tokens"),
    "key misplaced": ("name: tiny", "name: tiny\npage_size: 16", "2:1: page_size: found an unknown key; must be one of name, model, layers, serving, parallel, step, targets; move it under serving"),
    "key too deep": ("q_heads: 4", "q_heads: 4\n  name: x", f"4:3: model.name: found an unknown key; must be one of {MODEL}; move it to the top level"),
    "key twice": ("q_heads: 4", "q_heads: 4\n  q_heads: 4", "4:3: model.q_heads: found a second value; must be given once; remove this one or line 3"),
    "key missing": ("  q_heads: 4\n", "", f"3:3: model.q_heads: found no such key; {HEADS}; add `q_heads: 32`"),
    "key a list": ("q_heads: 4", "q_heads: 4\n  ? [a]\n  : 1", f"4:5: model: found a list; must be a key, one of {MODEL}; write a key here"),
    "merge key": ("q_heads: 4", "q_heads: 4\n  <<: {a: 1}", f"4:3: model.<<: found an unknown key; must be one of {MODEL}; remove it"),
    # YAML itself
    "tab": ("  q_heads: 4", "\tq_heads: 4", "3:1: found a syntax error (found character '\\t' that cannot start any token); must be YAML; indent with spaces"),
    "no colon": ("name: tiny", "name tiny", "2:6: found a syntax error (mapping values are not allowed here); must be YAML; correct the syntax at this place"),
    "open list": ("cpu]", "cpu", "17:1: found a syntax error (expected ',' or ']', but got '<stream end>'); must be YAML; correct the syntax at this place"),
    "open quote": ("cpu]", '"cpu]', "17:1: found a syntax error (found unexpected end of stream); must be YAML; correct the syntax at this place"),
    "control character": ("cpu]", "cpu\x07]", "16:21: found character 0x0007; must be printable text; remove it"),
    "second document": ("cpu]", "cpu]\n---\nname: x", "18:1: found a second document; must be one document; keep one spec a file"),
    "anchor": ("q_heads: 4", "q_heads: &heads 4", "3:12: found an anchor or alias; must be written out; write the value itself here"),
    "alias unknown": ("q_heads: 4", "q_heads: *heads", "3:12: found an anchor or alias; must be written out; write the value itself here"),
}  # fmt: skip


@pytest.mark.parametrize("old, new, line", ONE_EDIT.values(), ids=ONE_EDIT.keys())
def test_one_mistake_is_reported_once_where_it_is(old: str, new: str, line: str) -> None:
    assert GOOD.count(old) == 1
    assert report(GOOD.replace(old, new)) == [f"x.yaml:{line}"]


REQUIRED = [line for line in GOOD.splitlines() if not line.endswith(":") and "token_buckets" not in line]


@pytest.mark.parametrize("line", REQUIRED, ids=lambda line: line.split(":")[0].strip())
def test_a_key_that_is_missing_is_named_with_a_line_to_add(line: str) -> None:
    (problem,) = report(GOOD.replace(f"{line}\n", ""))
    key = line.split(":")[0].strip()
    assert f"{key}: found no such key; must be " in problem
    assert f"; add `{key}: " in problem


WHOLE_FILES = {
    "empty": ("", ":1:1: found an empty file; must be a spec; start from one of the shipped specs"),
    "comments only": ("# nothing\n", ":1:1: found an empty file; must be a spec; start from one of the shipped specs"),
    "null": ("---\n", ":1:1: found an empty file; must be a spec; start from one of the shipped specs"),
    "a list": ("- name\n", ":1:1: found a list; must be a mapping; write it as `key: value` lines"),
    "a word": ("name\n", ":1:1: found name; must be a mapping; write it as `key: value` lines"),
    "nested": ("[" * 5000, ": found lists or mappings nested too deeply; must be at most two deep; flatten it"),
    "aliases": ("layers:\n" + "\n".join(f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30)), ":2:7: found an anchor or alias; must be written out; write the value itself here"),
    "large": ("#" * 70000, ": found more than 65536 bytes; must be a spec; check that it is the right file"),
    "odd escape": ('"\\U00110000"', ": found a syntax error (chr() arg not in range(0x110000)); must be YAML; correct the escape or directive"),
}  # fmt: skip


@pytest.mark.parametrize("text, line", WHOLE_FILES.values(), ids=WHOLE_FILES.keys())
def test_a_file_that_is_no_spec_at_all_is_refused_in_one_line(text: str, line: str) -> None:
    assert report(text) == [f"x.yaml{line}"]


LISTS = {
    "buckets": (GOOD.replace("[8, 32]", f"[{', '.join(map(str, range(1, 101)))}]"), "12:266: serving.token_buckets: found 100 numbers; must be at most 64 of them; keep 64 of them"),
    "layers": (GOOD + "layers: {" + ", ".join(f"l{i}: {{}}" for i in range(40)) + "}\n", "17:288: layers: found 40 names; must be at most 32 of them; keep 32 of them"),
    "a list as a layer's name": (GOOD + "layers: {? " + "[" * 40 + "]" * 40 + " : {}}\n", "17:12: layers: found a list; must be lower-case letters, digits and dashes, 32 at most, a letter or digit first, each name once; write a name"),
}  # fmt: skip


@pytest.mark.parametrize("text, line", LISTS.values(), ids=LISTS.keys())
def test_a_list_that_is_too_long_or_odd_is_refused_before_it_is_used(text: str, line: str) -> None:
    assert line in "\n".join(report(text))


def test_no_more_problems_are_reported_than_somebody_reads() -> None:
    lines = report(GOOD + "".join(f"key{i}: 1\n" for i in range(3000)))
    assert len(lines) == 51
    assert lines[-1] == "x.yaml: found 2950 more problems; must have none; mend those above first"


def test_a_layer_can_leave_out_a_key_that_the_model_has() -> None:
    text = (
        GOOD.replace("q_heads: 4", "sliding_window: 64\n  q_heads: 4")
        + "layers: {local: {}, global: {sliding_window: null}}\n"
    )
    spec = parse_spec(text, "x.yaml")
    assert [part.model.sliding_window for part in spec.parts] == [64, None]


def test_sections_that_are_missing_or_no_mappings_are_reported_whole() -> None:
    serving, model = report("name: x\nmodel: 5\ntargets: [cpu]\n")
    assert serving == (
        f"x.yaml:1:1: serving: found no such key; must be a mapping with {SERVING}; "
        "add `serving:` and its keys, indented, below it"
    )
    assert model == (
        f"x.yaml:2:8: model: found 5; must be a mapping with {MODEL}; write its keys, indented, below `model:`"
    )


def test_every_problem_of_a_file_is_reported_from_top_to_bottom() -> None:
    text = """\
nam: tiny
model:
  q_heads: 31
  kv_heads: 8
  head_dim: 100
  q_dtype: bf16
  q_dtype: float32
serving:
  page_size: "16"
  max_model_len: 100
  max_num_tokens: 64
  token_buckets: [32, 16, 64]
  max_num_seqs: 65
  prefill_chunk: 128
  context_lens: [50, 1024]
targets: [tpu7x, npu, tpu7x]
"""
    places = [line.split(": ")[:2] for line in report(text)]
    assert places == [
        ["x.yaml:1:1", "nam"],
        ["x.yaml:3:3", "model.kv_dtype"],
        ["x.yaml:3:12", "model.q_heads"],
        ["x.yaml:5:13", "model.head_dim"],
        ["x.yaml:6:12", "model.q_dtype"],
        ["x.yaml:7:3", "model.q_dtype"],
        ["x.yaml:9:14", "serving.page_size"],
        ["x.yaml:12:23", "serving.token_buckets[1]"],
        ["x.yaml:13:17", "serving.max_num_seqs"],
        ["x.yaml:14:18", "serving.prefill_chunk"],
        ["x.yaml:14:18", "serving.prefill_chunk"],
        ["x.yaml:15:17", "serving.context_lens"],
        ["x.yaml:16:18", "targets[1]"],
        ["x.yaml:16:23", "targets[2]"],
    ]


def test_a_default_that_cannot_be_is_reported_at_its_section() -> None:
    text = GOOD.replace("max_model_len: 128", "max_model_len: 1048576").replace("max_num_seqs: 4", "max_num_seqs: 4096")
    text = text.replace("max_num_tokens: 32", "max_num_tokens: 4096").replace("[8, 32]", "[8, 4096]")
    (line,) = report(text)
    assert line == (
        "x.yaml:9:3: serving.num_pages: found 268435456, its default; must be at most 134217727, "
        "so that int32 can count the cache's tokens; write `num_pages: 134217727` or less"
    )


@pytest.mark.parametrize(
    "data, line",
    [
        (b"name: t\xffny\n", ":1:8: found byte 0xff; must be UTF-8; save the file as UTF-8"),
        (b"a: 1\nname: \xc3(\n", ":2:7: found byte 0xc3; must be UTF-8; save the file as UTF-8"),
        (GOOD.encode("utf-16"), ":1:1: found byte 0xff; must be UTF-8; save the file as UTF-8"),
        (b"\xff" * 70000, ": found more than 65536 bytes; must be a spec; check that it is the right file"),
    ],
    ids=["latin-1", "second line", "utf-16", "large"],
)
def test_bytes_that_are_no_text_are_placed(tmp_path: Path, data: bytes, line: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert str(caught.value) == f"{path}{line}"


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(SpecError) as caught:
        load_spec(missing)
    assert str(caught.value) == (
        f"{missing}: found a file that cannot be read (No such file or directory); "
        "must be a readable YAML file; check the path"
    )
    with pytest.raises(SpecError, match=r"cannot be read \(Is a directory\)"):
        load_spec(tmp_path)


def test_every_error_has_the_exit_code_of_its_kind() -> None:
    codes = {cls.__name__: cls.exit_code for cls in RpacError.__subclasses__()}
    assert codes == {
        "CheckError": 1,
        "SpecError": 2,
        "BatchError": 2,
        "SelectionError": 2,
        "PageError": 2,
        "PlanError": 2,
        "TargetError": 3,
        "CompileError": 3,
        "BundleError": 4,
        "OutputError": 5,
        "ScheduleError": 6,
    }
