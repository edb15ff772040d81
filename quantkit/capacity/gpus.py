"""GPUs that models are served on: their memory, and what an hour of them costs."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.errors import InputError, nearest

_MIB = 1 << 20
PRICES_AS_OF = "June 2025"
PRICES_ARE = "on-demand list prices of AWS EC2 in us-east-1, Linux, per GPU"
_QUERY = ("--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str
    memory_bytes: int
    """As nvidia-smi reports it: less than the name says."""
    compute_capability: tuple[int, int]
    hourly_price: float | None = None
    """US dollars; see PRICES_ARE and PRICES_AS_OF. None: no such list price."""

    @property
    def has_fp8(self) -> bool:
        """Whether it computes in FP8 (Ada, Hopper and later)."""
        return self.compute_capability >= (8, 9)


def _table(*rows: Gpu) -> Mapping[str, Gpu]:
    return MappingProxyType({row.name: row for row in rows})


GPUS: Mapping[str, Gpu] = _table(
    Gpu("T4", 15_360 * _MIB, (7, 5), 0.526),  # g4dn.xlarge
    Gpu("RTX-3090", 24_576 * _MIB, (8, 6)),
    Gpu("RTX-4090", 24_564 * _MIB, (8, 9)),
    Gpu("RTX-5090", 32_607 * _MIB, (12, 0)),
    Gpu("A10G", 23_028 * _MIB, (8, 6), 1.006),  # g5.xlarge
    Gpu("L4", 23_034 * _MIB, (8, 9), 0.805),  # g6.xlarge
    Gpu("L40S", 46_068 * _MIB, (8, 9), 1.861),  # g6e.xlarge
    Gpu("A100-40GB", 40_960 * _MIB, (8, 0), 2.745),  # an eighth of p4d.24xlarge
    Gpu("A100-80GB", 81_920 * _MIB, (8, 0), 3.431),  # of p4de.24xlarge
    Gpu("H100", 81_559 * _MIB, (9, 0), 6.88),  # of p5.48xlarge
    Gpu("H200", 143_771 * _MIB, (9, 0), 7.912),  # of p5en.48xlarge
    Gpu("B200", 183_359 * _MIB, (10, 0), 14.242),  # of p6-b200.48xlarge
)
"""Name -> GPU, by memory within each kind of machine."""


def find_gpu(name: str) -> Gpu:
    """Return a GPU of the table; upper and lower case are the same.

    Raises:
        InputError: it is not in the table.
    """
    found = {known.casefold(): gpu for known, gpu in GPUS.items()}.get(name.casefold())
    if found is None:
        near = nearest(name, GPUS)
        raise InputError(f"GPU {name!r} is unknown{near} (known: {', '.join(GPUS)})")
    return found


def find_machine_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine as nvidia-smi lists them; none where it is not there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        listed = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return read_listing(listed.stdout) if listed.returncode == 0 else ()


def read_listing(listing: str) -> tuple[Gpu, ...]:
    """Return the GPUs of nvidia-smi's listing: name, MiB, compute capability; one a line.

    Lines that are no such thing, as of a GPU that is lost, are left out.
    """
    found = []
    for row in csv.reader(io.StringIO(listing), skipinitialspace=True):
        try:
            name, mebibytes, capability = row
            major, minor = capability.split(".")
            found.append(Gpu(name, int(mebibytes) * _MIB, (int(major), int(minor))))
        except ValueError:
            continue
    return tuple(found)
