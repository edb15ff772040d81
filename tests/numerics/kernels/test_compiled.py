"""The kernels compiled for GPUs that this machine need not have, down to their machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.kernels

SCRIPT = """
import json, re, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quantkit.numerics.kernels import cheapest, descent, ggml_search, gptq_block, pack, square

F = "*fp32"
CODES = {"low": "i32", "high": "i32", "table": F}
BLOCKS = {"x": F, "weights": F, "spans": F, "scales": F, "minimums": F, "codes": "*i32"}
COUNTS = {"count": "i32", "attempts": "i32", "size": "i32", "rows": "i32", "total": "i32"}
COLUMNS = dict.fromkeys(
    ("block", "target", "lower", "steps", "offsets", "errors", "values", "gains", "residual"), F
)
SQUARE = {"total": F, "rows": "*bf16", "tokens": "i32", "token_stride": "i32"}
PACK = {"codes": "*i8", "packed": "*i32", "columns": "i32", "words": "i32"}
CHEAPEST = {
    "grouped": F, "units": F, "scales": "*bf16", "zero_points": "*i8", "importance": F,
    "found": "*i64", "candidates": "i32", "period": "i32",
}
ROUND = {"SHIFTED": True, "COLUMNS": 128, "ROWS": 32}
INTEGER, FLOAT, TABLE = ({"KIND": kind, "ENTRIES": 16 if kind == 2 else 1} for kind in range(3))
KERNELS = {
    "integers": (gptq_block._round_rows, COLUMNS, ROUND | INTEGER, 4),
    "fp8": (gptq_block._round_rows, COLUMNS, ROUND | FLOAT, 4),
    "table": (gptq_block._round_rows, COLUMNS, ROUND | TABLE, 4),
    "descent": (descent._descend_rows, COLUMNS | {"inner": F}, ROUND | INTEGER, 4),
    "square": (
        square._add_tile, SQUARE,
        {"column_stride": 1, "PANEL": 512, "TILE": 128, "TOKENS": 64, "WIDEN": False}, 8,
    ),
    "pack": (pack._pack_words, PACK, {"BITS": 4, "WORDS": 256}, 4),
    "cheapest": (
        cheapest._choose, CHEAPEST, INTEGER | {"SHIFTED": True, "GROUPS": 16, "WIDTH": 128}, 4,
    ),
    "affine": (
        ggml_search._search_affine, BLOCKS,
        {"PLACES": 32, "TOP": 15, "ABSOLUTE": False, "WRAPS": True, "BLOCKS": 128}, 4,
    ),
    "symmetric": (
        ggml_search._search_symmetric, BLOCKS, {"PLACES": 16, "TOP": 32, "BLOCKS": 128}, 4,
    ),
}
found = {}
for name, (kernel, types, constants, warps) in KERNELS.items():
    every = COUNTS | CODES | types
    signature = {
        argument: "constexpr" if argument in constants else every[argument]
        for argument in kernel.arg_names
    }
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument in ("size", "token_stride") or signature[argument].startswith("*")
    }
    built = compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", int(sys.argv[1]), 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    ptx = built.asm["ptx"]
    count = lambda pattern: len(re.findall(pattern, ptx))
    found[name] = {
        "bytes": len(built.asm["cubin"]),
        "shared": built.metadata.shared,
        "approximate": count(r"div\\.(full|approx)|\\.ftz"),
        "fused": count(r"fma\\.rn\\.f32"),
        "tensor_cores": count(r"mma\\.sync|wgmma\\.mma_async"),
    }
print(json.dumps(found))
"""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_gpus(capability: str) -> None:
    """No approximate division, no flushed number, nothing fused but where torch does it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, capability],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, facts in found.items():
        assert facts["bytes"] > 0
        assert facts["approximate"] == 0, name
        assert (facts["fused"] > 0) == (name in ("integers", "fp8", "table", "descent")), name
        assert (facts["tensor_cores"] > 0) == (name == "square"), name
        # An SM 8.0 lends one block 163 KiB.
        assert facts["shared"] <= 163 << 10, name
