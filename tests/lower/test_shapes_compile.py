"""A spec of other rows and numbers than the shipped ones have, from its text to a bundle that serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import TINY, rpac

EDITS = {
    "head_dim: 128": "head_dim: 64",
    "kv_dtype: bfloat16": "kv_dtype: int8\n  kv_scale: head\n  quantize: kernel",
    "targets: [tpu7x, v6e, v5p, v5e, cpu]": "targets: [cpu]",
    "token_buckets: [8, 32]": "token_buckets: [32]",
}


@pytest.mark.parametrize("kv_layout", ["interleaved", pytest.param("separate", marks=pytest.mark.slow)])
def test_a_bundle_of_8_bits_and_scales_serves(tmp_path: Path, kv_layout: str) -> None:
    text = TINY.read_text().replace("page_size: 16", f"page_size: 32\n  kv_layout: {kv_layout}")
    for old, new in EDITS.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "bytes.yaml").write_text(text)
    built = rpac("build", tmp_path / "bytes.yaml", "-o", tmp_path, cache=tmp_path / "cache")
    assert built.returncode == 0, built.stderr
    served = rpac("serve-check", tmp_path / "tiny.rpac", cache=tmp_path / "cache")
    assert served.returncode == 0, served.stdout
    assert "serves here" in served.stdout
