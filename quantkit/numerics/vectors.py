"""Vectors of LLVM, for compiled loops that it would not turn into instructions for vectors itself.

Importing this module raises ImportError where numba is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

INTEGER, INDEX = ir.IntType(32), ir.IntType(64)


def index(number: int) -> Any:
    """Return a number to count or to address with."""
    return ir.Constant(INDEX, number)


def find_arrays(context: Any, builder: Any, signature: Any, arguments: Any) -> Iterator[Any]:
    """Yield those of the arguments that are arrays."""
    for kind, argument in zip(signature.args, arguments, strict=True):
        if isinstance(kind, types.Array):
            yield context.make_array(kind)(context, builder, argument)


def at(builder: Any, start: Any, offset: Any, kind: Any) -> Any:
    """Return a pointer to what lies an offset in bytes behind an address."""
    return builder.inttoptr(builder.add(start, offset), kind.as_pointer())


def spread(builder: Any, number: Any, kind: Any) -> Any:
    """Return a vector of a kind that has a number in all lanes."""
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, number, ir.Constant(INTEGER, 0))
    everywhere = ir.Constant(ir.VectorType(INTEGER, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, nothing, everywhere)


def add_product(builder: Any, left: Any, right: Any, added: Any) -> Any:
    """Return left * right + added for vectors of float32, rounded once."""
    kind = ir.FunctionType(added.type, [added.type] * 3)
    name = f"llvm.fma.v{added.type.count}f32"
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, name), [left, right, added]
    )
