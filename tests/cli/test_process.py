"""How the command's own process treats threads and memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = (
    "import os; from quantkit.cli.process import settle_process; settle_process();"
    "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
)


def run_alone(script: str, environment: dict[str, str]) -> str:
    """Return what a script prints in a process of its own."""
    reply = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return reply.stdout.strip()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "None 20000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "5"}, "None 5"),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(
    given: dict[str, str], expected: str
) -> None:
    """The usual variables win."""
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given

    assert run_alone(SHOW, environment) == expected


@pytest.mark.parametrize("given", ["0", None])
def test_torch_asks_for_huge_pages_unless_the_user_says_otherwise(given: str | None) -> None:
    """The variable is in place before torch is imported."""
    environment = {key: value for key, value in os.environ.items() if "THP_MEM" not in key}
    if given is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = given
    show = (
        "import os, sys; from quantkit.cli.process import settle_process; settle_process();"
        "print(os.environ['THP_MEM_ALLOC_ENABLE'], 'torch' in sys.modules)"
    )

    assert run_alone(show, environment).split() == [given or "1", "False"]


@pytest.mark.parametrize(
    ("limited", "given", "mapped"),
    [(False, None, [0, 1, 1]), (True, None, [0, 0, 1]), (True, "1048576", [0, 1, 1])],
    ids=["no limit", "a limit", "the user's own"],
)
def test_freed_memory_stays_where_activations_are_parked(
    limited: bool, given: str | None, mapped: list[int]
) -> None:
    """Blocks of 0.5, 8 and 32 MiB: which of them glibc maps on their own."""
    environment = {key: value for key, value in os.environ.items() if "MALLOC_MMAP" not in key}
    if given is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = given
    show = (
        "import ctypes\n"
        "from quantkit.cli.process import settle_for_a_limit, settle_process\n"
        "settle_process()\n"
        f"settle_for_a_limit() if {limited} else None\n"
        "library = ctypes.CDLL(None)\n"
        "Counts = type('Counts', (ctypes.Structure,), {'_fields_': [\n"
        "    (name, ctypes.c_size_t) for name in 'abcdefghij']})\n"
        "library.mallinfo2.restype = Counts\n"
        "library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "found = []\n"
        "for size in (1 << 19, 1 << 23, 1 << 25):\n"
        "    before = library.mallinfo2().d\n"
        "    library.malloc(size)\n"
        "    found.append(library.mallinfo2().d - before)\n"
        "print(found)\n"
    )

    assert run_alone(show, environment) == str(mapped)


@pytest.mark.parametrize(
    ("given", "kept"), [(None, "16"), ("64", "64")], ids=["ours", "the user's"]
)
def test_a_limit_bounds_the_code_that_is_kept_for_shapes(given: str | None, kept: str) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    environment = {key: value for key, value in os.environ.items() if key != name}
    if given is not None:
        environment[name] = given
    script = (
        "import os\n"
        "from quantkit.cli.process import settle_for_a_limit\n"
        "settle_for_a_limit()\n"
        f"print(os.environ['{name}'])\n"
    )

    assert run_alone(script, environment) == kept


def test_what_a_command_is_made_of_is_never_collected_and_later_garbage_is() -> None:
    """The modules of the first load alone are kept; the collector runs on as before."""
    script = (
        "import gc, quantkit\n"
        "from quantkit.cli.process import load_for_good\n"
        "load_for_good(lambda: quantkit.load_recipe)\n"
        "kept = gc.get_freeze_count()\n"
        "later = load_for_good(lambda: quantkit.Solver)\n"
        "print(kept > 10_000, gc.get_freeze_count() == kept, gc.isenabled())\n"
    )

    assert run_alone(script, dict(os.environ)) == "True True True"
