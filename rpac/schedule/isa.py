"""What the instructions of a schedule mean.

Scalar registers hold 32-bit integers, kept signed here. Pointers into HBM and VMEM are wider (see `memory.py`): only
`scalar_lea.*`, and a shift that feeds an `int_to_ptr.*`, make one. Predicates are bools, so that `&`, `|`, `^` work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

GRANULE_BYTES: Final = 32
"""What DMA sizes and HBM addresses count in."""

SLOTS: Final = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
"""The columns of the compiler's `*-per-bundle-utilization.txt`. A fill is also a load, a spill also a store."""


@dataclass(frozen=True)
class Generation:
    """What a walk must know of one TPU generation.

    delay_slots: VLIW instructions executed after a branch before it takes effect. hbm_pointer_granules: granules in one unit of
    an HBM operand's address. matmul: a pattern that this generation's `vmatmul` opcodes match and others' do not;
    v5p's and v5e's are the same, and only their HBM pointers differ.
    """

    target: str
    delay_slots: int
    hbm_pointer_granules: int
    matmul: re.Pattern[str]


GENERATIONS: Final = {
    g.target: g
    for g in (
        Generation("tpu7x", 6, 1, re.compile(r"\.mrb\[")),
        Generation("v6e", 4, 1, re.compile(r"\.mubr\.(?!.*\.mrb)")),
        Generation("v5p", 4, 1, re.compile(r"vmatmul\.(?!mubr)")),
        Generation("v5e", 4, 16, re.compile(r"vmatmul\.(?!mubr)")),
    )
}


def _wrap(expression: str) -> str:
    return f"({expression}+H & M)-H"


_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

PURE: Final[dict[str, str]] = {
    "smov": "{0}",
    "pmov": "{0}",
    "sadd.s32": _wrap("{0}+{1}"),
    "ssub.s32": _wrap("{0}-{1}"),
    "smul.u32": _wrap("{0}*{1}"),
    "smul.s32": _wrap("{0}*{1}"),
    "smulhi.u32": _wrap("(({0} & M) * ({1} & M) >> 32)"),
    "sand.u32": "{0} & {1}",
    "sor.u32": "{0} | {1}",
    "sxor.u32": "{0} ^ {1}",
    "sshll.u32": "shl({0}, {1})",
    "sshrl.u32": "shr({0}, {1})",
    "sshra.s32": "{0} >> {1}",
    "smin.u32": "umin({0}, {1})",
    "smax.u32": "umax({0}, {1})",
    "sc.u32": "({0} & M) + ({1} & M) > M",
    "scalar_select": "pick({0}, {1}, {2})",
    "scalar_lea.hbm": "{0}+{1}",
    "scalar_lea.vmem": "{0}+{1}",
    "scalar_lea.smem": "{0}+{1}",
    "scalar_lea.sflag": "{0}+{1}",
    "pnand": "({0} & {1}) ^ True",
    "pand": "{0} & {1}",
    "por": "{0} | {1}",
    "pnor": "({0} | {1}) ^ True",
    "pxor": "{0} ^ {1}",
    "pneg": "{0} ^ True",
    **{f"scmp.{name}.s32.totalorder": f"{{0}} {sign} {{1}}" for name, sign in _COMPARE.items()},
    **{f"scmp.{name}.u32.totalorder": f"({{0}} & M) {sign} ({{1}} & M)" for name, sign in _COMPARE.items()},
}
"""Operations without side effect: opcode -> Python expression over its arguments. H is 2**31, M is 2**32 - 1."""

WIDE_SHIFT: Final = "{0} << {1}"
"""A left shift whose result is made a pointer: it must not wrap at 32 bits."""

RENAMES: Final = frozenset({"int_to_ptr.hbm", "int_to_ptr.vmem", "int_to_ptr.smem", "int_to_ptr.sflag"})
PHIS: Final = frozenset({"sphi", "pphi"})
OPERANDS: Final = {
    "inlined_call_operand.hbm": "hbm",
    "inlined_call_operand.vmem": "vmem",
    "inlined_call_operand.smem": "smem",
    "inlined_call_operand.<no memory space>": "register",
}
"""How a kernel names its operands -> where they live."""

DMAS: Final = frozenset(
    f"dma.{source}_to_{destination}"
    for source in ("hbm", "vmem", "smem")
    for destination in ("hbm", "vmem", "smem")
    if source != destination or source != "smem"
) | {"dma.general"}
EFFECTS: Final = frozenset(
    {"sld", "sst", "sbr.rel", "shalt.err", "vsyncadd", "vsyncpa", "vsyncmov", "vpop.sfrf", "sdivrem.u32", "spop.drf"}
    | {"dma.done.wait"}
)
UNKNOWN_SCALARS: Final = frozenset({"spop"})
"""Scalars that come out of vectors, so out of data that a walk does not have."""

NOOPS: Final = frozenset({"sfence", "compiler-scheduling-barrier", "sdelay", "set.rngseed"})

FLOAT_SCALAR: Final = re.compile(
    r"s(?:add|sub|mul|max|min|div|ceil|floor|trunc|round|clamp|rcp)\.(?:f32|bf16)"
    r"|scvt\.\w+\.\w+|scmp\.\w\w\.(?:f32|bf16)\.\w+|sweird\.f32"
)
"""Float arithmetic in scalar registers, which is not tracked: its results count as unknown."""

# fmt: off
_VECTOR_STEMS: Final = frozenset(
    {
        "vadd", "vsub", "vmul", "vmax", "vmin", "vand", "vandn", "vor", "vxor", "vnot", "vneg", "vabs", "vcmp", "vsel", "vmov",
        "vshll", "vshrl", "vshra", "vpack", "vunpack", "vcvt", "vround", "vfloor", "vceil", "vtrunc", "vclz", "vpcnt",
        "vclamps", "vlaneseq", "vcmask", "vmand", "vmor", "vmxor", "vmneg", "vmnand", "vmmov", "vnez", "vstv", "vmpackc",
        "vmpack", "vmunpack", "vcombine", "vweird", "vmad", "vfma", "vsmask", "vmatmul", "vmatpush", "vmatpush1",
        "vmatpush2", "vmatpush3", "vmatprep", "vlatch", "vdwg", "vrot", "vperm", "vpermute", "vxpose", "vbcast",
        "vset", "vsetpat", "vsettm", "vsetiar", "vrng", "vpow", "vpow2", "vrcp", "vexp2", "vrsqrt", "vtanh", "vlog2", "verf",
        "vsin", "vcos", "vpop", "vld", "vst", "vpush", "vtrace", "vdelay", "vphi", "vc", "vmac", "vmovacc", "vcosq", "vsinq"
    }
)
# fmt: on


def is_vector(opcode: str) -> bool:
    """Whether an opcode is a vector instruction that this package knows: one slot, no effect on scalars."""
    return opcode.partition(".")[0] in _VECTOR_STEMS
