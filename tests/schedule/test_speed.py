"""A walk must not be what a user waits for."""

from __future__ import annotations

import time

from rpac.schedule.walk import walk

from .miniature import DELAY, load_operand, model, schedule
from .test_walk import FLAG, branch_to


def test_thirty_thousand_bundles_and_64_sequences_take_under_five_seconds() -> None:
    """A loop over sequences with 1,000 page fetches of ten scalar instructions each, and vector work between them."""
    fetch = [
        "%s{i}1_s1 = sld [smem:[#allocation7 + $0x1]]  ;;  %s{i}2_s2 = ssub.s32 %s501_s3, {i}",
        "%s{i}3_s2 = sshll.u32 %s{i}1_s1, 4  ;;  %p{i}4_p2 = scmp.gt.s32.totalorder %s{i}2_s2, 9",
        "%s{i}5_s2 = scalar_select /*predicate=*/%p{i}4_p2, /*on_true=*/16, /*on_false=*/8",
        "%s{i}6_s2 = scalar_lea.hbm %s900_s0, %s{i}3_s2",
        "%9 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s{i}6_s2, /*size_in_granules=*/%s{i}5_s2, /*vmem=*/0, " + FLAG,
        *["%v1_v1 = vadd.f32 %v2_v2, %v3_v3  ;;  %v4_v4 = vmul.f32 %v1_v1, %v2_v2"] * 25,
    ]
    body = [line.format(i=i) for i in range(1, 1001) for line in fetch]
    lines = branch_to(
        [
            *load_operand("tpu7x", 0, 8, "allocation7"),
            "%s500_s3 = smov 0",
            "LB|%s501_s3 = sphi %s500_s3, %s502_s3  ;;  %s502_s3 = sadd.s32 1, %s501_s3",
            *body,
            "%p503_p0 = scmp.lt.s32.totalorder %s502_s3, 64",
            "%504 = sbr.rel (%p503_p0) target bundleno = LOOP (0x0), region = 3",
            DELAY["tpu7x"],
        ]
    )
    start = time.process_time()
    parsed = schedule("tpu7x", *lines)
    done = walk(parsed, {0: [0, 3, 0, 0, 0, 0, 0, 0]}, model("tpu7x"))
    assert len(parsed.bundles) > 30_000
    assert done.dmas == 1 + 64_000
    assert time.process_time() - start < 5
