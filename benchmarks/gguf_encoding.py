"""Time the encoders of GGUF's types against llama.cpp's own on the same cores, byte for byte.

Both turn the same random weights into the same bytes, which is checked; they take turns in one
run, so that other load on the machine falls on either. Theirs is `ggml_quantize_chunk` of the
xllamacpp wheel, called for as many shares of the rows as there are threads, all at once.

usage: python benchmarks/gguf_encoding.py [--size 2048] [--threads 2] [--rounds 9]
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from measure import describe_commit, describe_machine, package_versions, write_results
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES, GgmlType
from quantkit.numerics.ggml.codec import encode_rows

TYPES = ("Q4_K", "Q6_K", "Q8_0")
PACKAGES = ("quantkit", "torch", "numba", "xllamacpp")


@dataclass(frozen=True)
class Comparison:
    """Seconds of one encoding, medians of some rounds."""

    type: str
    matrix: bool
    ours: float
    theirs: float
    ratio: float
    """Median of theirs / ours of the rounds: above 1 ours is sooner."""


class Ggml:
    """`ggml_quantize_chunk`, shared out over threads, which Python's lock does not hold up."""

    def __init__(self, threads: int) -> None:
        package = importlib.util.find_spec("xllamacpp")
        if package is None or package.origin is None:
            raise SystemExit("install xllamacpp, the llama.cpp to compare with")
        path = Path(package.origin).parent / "xllamacpp.abi3.so"
        self._encode = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self._encode.restype = ctypes.c_size_t
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._encode.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def encode_rows(self, kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Tensor:
        """Return uint8 [R, row bytes]."""
        rows, columns = weight.shape
        result = np.zeros((rows, kind.row_bytes(columns)), dtype=np.uint8)
        matrix = None if importance is None else importance.data_ptr()

        def encode(share: int) -> None:
            first = rows * share // self._threads
            count = rows * (share + 1) // self._threads - first
            source, target = weight[first:].data_ptr(), result[first:].ctypes.data
            self._encode(kind.id, source, target, 0, count, columns, matrix)

        list(self._pool.map(encode, range(self._threads)))
        return torch.from_numpy(result)


def main() -> None:
    """Compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.size, options.size, generator=generator)
    importance = torch.rand(options.size, generator=generator)
    ggml = Ggml(options.threads)
    comparisons = [
        compare(GGML_TYPES[name], weight, matrix, ggml, options.rounds)
        for name in TYPES
        for matrix in (None, importance)
    ]
    document = {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "packages": package_versions(PACKAGES),
        **vars(options),
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    write_results("gguf_encoding", document, describe(comparisons, options))


def compare(
    kind: GgmlType, weight: Tensor, importance: Tensor | None, ggml: Ggml, rounds: int
) -> Comparison:
    """Encode the weights in turns, after a round that is not counted."""
    pairs = []
    for _ in range(rounds + 1):
        ours, found = timed(lambda: encode_rows(kind, weight, importance))
        theirs, expected = timed(lambda: ggml.encode_rows(kind, weight, importance))
        if not torch.equal(found, expected):
            raise SystemExit(f"the bytes of {kind.name} are not those of ggml")
        pairs.append((ours, theirs))
    pairs = pairs[1:]
    return Comparison(
        kind.name,
        importance is not None,
        statistics.median(ours for ours, _ in pairs),
        statistics.median(theirs for _, theirs in pairs),
        statistics.median(theirs / ours for ours, theirs in pairs),
    )


def timed(encode: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the seconds that it took, and its result."""
    start = time.perf_counter()
    result = encode()
    return time.perf_counter() - start, result


def describe(comparisons: list[Comparison], options: argparse.Namespace) -> str:
    """Return the comparisons as Markdown."""
    lines = [
        f"Encoding {options.size} x {options.size} float32 weights with {options.threads} threads,",
        f"medians of {options.rounds} rounds in turns; the bytes are the same.",
        "",
        "| type | importance matrix | quantkit | ggml | ggml / quantkit |",
        "|---|---|---:|---:|---:|",
    ]
    for row in comparisons:
        matrix = "yes" if row.matrix else "no"
        times = f"{row.ours * 1000:.0f} ms | {row.theirs * 1000:.0f} ms | {row.ratio:.1f}"
        lines.append(f"| {row.type} | {matrix} | {times} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
