"""A first launch of every kernel on a few numbers: does it compile here, and compute?

Importing this module raises ImportError where triton is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from subprocess import CalledProcessError

import torch
from triton.errors import TritonError

from quantkit.errors import QuantkitError
from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.affine import round_values
from quantkit.numerics.ggml.encode_k_search import (
    AffineGrid,
    search_affine,
    search_symmetric,
)
from quantkit.numerics.kernels import cheapest, descent, ggml_search, gptq_block, pack, square
from quantkit.schemes import SCHEMES

_COLUMNS = 128


def try_kernels(device: torch.device) -> None:
    """Launch every kernel once.

    Raises:
        QuantkitError: one does not run on this device, or finds something else than torch.
    """
    for name, check in _CHECKS.items():
        problem = "it finds something else than torch"
        try:
            if check(device):
                continue
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError, OSError, CalledProcessError) as error:
            first_line = str(error).strip().split("\n")[0]
            problem = f"{type(error).__name__}: {first_line}"
        raise QuantkitError(
            f"the Triton kernel {name} does not work on {_name(device)} "
            f"({problem}); set QUANTKIT_KERNELS=0 to do without kernels"
        )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _numbers(device: torch.device, *shape: int) -> torch.Tensor:
    """Return numbers between -2 and 2 whose products are exact in float32."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count, device=device) * 37 % 257 - 128) / 64).reshape(shape)


def _check_round_columns(device: torch.device) -> bool:
    scheme, block = SCHEMES["w4a16_asym"], _numbers(device, _COLUMNS, 5)
    steps, offsets = torch.full_like(block, 0.25), torch.ones_like(block)
    target, errors = block.clone(), torch.empty_like(block)
    lower = torch.eye(_COLUMNS, device=device)
    gptq_block.round_columns(block, target, lower, steps, offsets, scheme, errors)
    expected = round_values(block / steps, scheme, offsets)
    return torch.equal(target, expected) and torch.equal(errors, block - expected * steps)


def _check_descend_columns(device: torch.device) -> bool:
    scheme, residual = SCHEMES["w4a16"], _numbers(device, _COLUMNS, 5)
    steps, values = torch.full_like(residual, 0.25), torch.zeros_like(residual)
    inner = torch.eye(_COLUMNS, device=device)
    expected = round_values(residual / steps, scheme, None)
    rest = residual - expected * steps
    descent.descend_columns(values, steps, 1 / steps, None, residual, inner, scheme)
    return torch.equal(values, expected) and torch.equal(residual, rest)


def _check_add_square(device: torch.device) -> bool:
    rows, total = _numbers(device, 70, 130), torch.ones(130, 130, device=device)
    square.add_square(total, rows.bfloat16(), 256)
    expected = rows.double().T @ rows.double() + 1
    return torch.allclose(total.double(), expected, rtol=0, atol=1e-3)


def _check_cheapest_scales(device: torch.device) -> bool:
    scheme, grouped = SCHEMES["w4a16"], _numbers(device, 3, 2, 32)
    unit = torch.ones(3, 2, device=device)
    scales = torch.stack([unit, unit / 4, unit / 16]).bfloat16()
    found = cheapest.cheapest_scales(grouped, unit, scales, None, torch.ones_like(grouped), scheme)
    values = [round_values(grouped / scale, scheme, None) * scale for scale in (1.0, 0.25, 0.0625)]
    costs = torch.stack([(value - grouped).square().sum(2) for value in values])
    return torch.equal(found, costs.argmin(0))


def _check_search_affine(device: torch.device) -> bool:
    x, grid = _numbers(device, 32, 7), AffineGrid(15, -1.0, 0.1, 3, wraps=True)
    found = ggml_search.search_affine(x, x.abs() + 1, grid)
    return all(map(torch.equal, found, search_affine(x, x.abs() + 1, grid)))


def _check_search_symmetric(device: torch.device) -> bool:
    x, top = _numbers(device, 16, 7), -GGML_TYPES["Q6_K"].codes[0]
    found = ggml_search.search_symmetric(x, x.square(), top)
    return all(map(torch.equal, found, search_symmetric(x, x.square(), top)))


def _check_pack_rows(device: torch.device) -> bool:
    """Codes -8 to -1 and one more: hexadecimal digits 0 to 7 from the right, then an 8 alone."""
    codes = torch.arange(-8, 1, dtype=torch.int8, device=device).reshape(1, 9)
    return pack.pack_rows(codes, 4).tolist() == [[0x76543210, 8]]


_CHECKS: Mapping[str, Callable[[torch.device], bool]] = {
    "round_columns": _check_round_columns,
    "descend_columns": _check_descend_columns,
    "add_square": _check_add_square,
    "cheapest_scales": _check_cheapest_scales,
    "search_affine": _check_search_affine,
    "search_symmetric": _check_search_symmetric,
    "pack_rows": _check_pack_rows,
}
