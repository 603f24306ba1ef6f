"""Compiles every Triton kernel for a GPU that need not be here; prints what one program needs.

    python tests/model/compile_kernels.py [CAPABILITY, 90 if not given]
"""
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fira.model import triton_kernels
from fira.model.triton_swiglu import NARROW, OPTIONS, WIDE

DATA = {"weights": "*fp32", "dots": "*fp32", "order": "*i64", "owner": "*i64", "first": "*i64",
        "ends": "*i64"}
ALWAYS = {"E": 4, "K": 2}
VARIANTS = [
    ("hidden_kernel", NARROW, {}),
    ("pair_kernel", WIDE, {"TWO": False, "WEIGHTED": True, "step_in": 1}),
    ("pair_kernel", WIDE, {"TWO": True, "WEIGHTED": False, "step_out": 1}),
    ("hidden_gradient_kernel", NARROW, {}),
    ("weight_gradient_kernel", WIDE, {"GATHER_A": True, "GATHER_B": False}),
    ("weight_gradient_kernel", WIDE, {"GATHER_A": False, "GATHER_B": True})]


def signature(kernel, fixed):
    """Numbers are int32 and, as widths of 16 bytes are, divisible by 16; data is bfloat16."""
    types, constants, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            types[name], constants[name] = "constexpr", fixed[name]
            continue
        number = name in ("D", "F", "HEIGHT", "WIDTH") or name.startswith("step")
        types[name] = "i32" if number else DATA.get(name, "*bf16")
        aligned[place,] = [["tt.divisibility", 16]]
    return types, constants, aligned


def main():
    target = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)
    for name, tile, fixed in VARIANTS:
        kernel = getattr(triton_kernels, name)
        source = ASTSource(kernel, *signature(kernel, ALWAYS | tile.sizes | fixed))
        made = triton.compile(source, target=target, options=OPTIONS)
        text = made.asm["ptx"]
        print(f"{name}: {made.metadata.shared / 1024:.0f} KiB shared, "
              f"{len(re.findall('wgmma.mma_async|mma.sync', text))} tensor-core instructions, "
              f"{len(made.asm['cubin']) / 1024:.0f} KiB of code")


if __name__ == "__main__":
    main()
