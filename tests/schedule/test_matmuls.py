"""The flops of a module are those of its matrix products."""

from __future__ import annotations

import pytest

from rpac.schedule.hlo import parse_module
from rpac.schedule.matmuls import flops_of

HEAD = """ENTRY %main (x: bf16[64,256], y: bf16[256,512]) -> bf16[64,512] {
  %x = bf16[64,256]{1,0} parameter(0)
  %y = bf16[256,512]{1,0} parameter(1)
  %z = bf16[4,256,512]{2,1,0} parameter(2)
  %w = bf16[4,64,256]{2,1,0} parameter(3)
  %v = bf16[64,256,1]{1,0,2} parameter(4)
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16[64,512]{1,0} convolution(%x, %y), dim_labels=bf_io->bf", 2 * 64 * 256 * 512),
        ("bf16[64,512]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 64 * 256 * 512),
        (
            "bf16[4,64,512]{2,1,0} convolution(%w, %z), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, "
            "dim_labels=0bf_0io->0bf",
            2 * 4 * 64 * 256 * 512,
        ),
        (  # one row of tokens for each of several experts: all places of the window but one lie in the padding
            "bf16[64,4,512]{2,0,1} convolution(%v, %z), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0io->b0f",
            2 * 4 * 64 * 256 * 512,
        ),
        (  # a sum over experts
            "bf16[64,512,1]{1,0,2} convolution(%w, %z), window={size=4}, dim_labels=0bf_0io->bf0",
            2 * 4 * 64 * 256 * 512,
        ),
        ("bf16[64,512]{1,0} add(%x, %y)", 0),
    ],
)
def test_a_product_takes_two_flops_for_each_term(text: str, expected: int) -> None:
    module = parse_module(f"{HEAD}  ROOT %r = {text}\n}}\n")
    assert flops_of(module, module["r"]) == expected
