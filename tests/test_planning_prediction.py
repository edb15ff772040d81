"""What a job is foretold to take: counts by hand, and what must follow from what."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.block_loop import blocks_ahead
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.describe import describe_plan
from quantkit.errors import ResourceError
from quantkit.job import plan_job
from quantkit.planning import make_plan
from quantkit.planning.costs import COSTS, find_seconds, find_terms
from quantkit.planning.holding import find_device_peak, find_peak
from quantkit.planning.prediction import predict
from quantkit.planning.probe import probe_machine
from quantkit.planning.workload import Workload, measure_model
from quantkit.recipe import validate
from quantkit.records import AcceleratorProbe, MachineProbe, Plan
from tests.helpers import make_pico_model
from tests.pico_jobs import make_pico_job

PROBE = MachineProbe(
    threads=1,
    float32_gflops=1.0,
    bfloat16_gflops=4.0,
    cholesky_gflops=0.5,
    moved_bytes_per_second=1e9,
    call_seconds=1e-6,
    hash_bytes_per_second=1e9,
    read_bytes_per_second=2e9,
    write_bytes_per_second=1e9,
    resident_bytes=400_000_000,
    free_memory_bytes=8_000_000_000,
)

BLOCKS, HIDDEN, MIDDLE, KV = 2, 64, 128, 32
BLOCK_WEIGHTS = 2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * HIDDEN * MIDDLE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks 64 wide, 128 in the middle, with two heads of keys and values of 16."""
    return make_pico_model(tmp_path_factory.mktemp("pico"), vocab=300, tokenizer=False)


def make(model: Path, method: str = "gptq", **changes: Any) -> tuple[Plan, Workload]:
    """The plan of a method and its work, with 8 windows of 64 tokens."""
    recipe = validate(
        {
            "version": 1,
            "quantize": {"group_size": 32, "method": method},
            "calibration": {"data": "x.txt", "samples": 8, "sequence_length": 64},
            "gate": {"data": "y.txt", "sequence_length": 64},
        }
    )
    checkpoint = open_checkpoint(resolve_source(str(model)))
    plan = make_plan(recipe, checkpoint)
    work = Workload(
        model=measure_model(checkpoint, plan),
        calibration_windows=0 if method == "rtn" else 8,
        calibration_length=0 if method == "rtn" else 64,
        gate_windows=16,
        gate_length=64,
        probed=True,
        formats=("compressed-tensors",),
        data_bytes=1_000_000,
        compute_bytes=2,
    )
    return plan, replace(work, **changes)


def test_sizes_of_a_model_come_from_its_headers(model: Path) -> None:
    """The table of 300 tokens is the largest matrix outside of the blocks."""
    sizes = make(model)[1].model

    assert (sizes.hidden, sizes.vocabulary, sizes.item_bytes) == (HIDDEN, 300, 2)
    assert sizes.embedding_bytes == 300 * HIDDEN * 2
    assert sizes.block_bytes == 2 * (BLOCK_WEIGHTS + 2 * HIDDEN)
    assert sizes.outside_parameters == 300 * HIDDEN + HIDDEN
    assert sizes.file_bytes == BLOCKS * sizes.block_bytes + sizes.outside_bytes


def test_operations_of_the_walk_are_counted(model: Path) -> None:
    """By hand: 512 tokens at 4 GFLOP/s of bfloat16."""
    plan, work = make(model)

    terms = find_terms(plan, work, PROBE)["quantize"]

    tokens = 8 * 64
    assert terms["walk: forward"] == pytest.approx(2 * BLOCKS * BLOCK_WEIGHTS * tokens / 4e9)
    attention = 2 * tokens * 64 * HIDDEN * BLOCKS / 4e9
    assert terms["walk: attention"] == pytest.approx(4.5 * attention)
    # The inputs of q, o and gate are 64 wide, that of down 128; half of a product by symmetry.
    sums = BLOCKS * (3 * HIDDEN**2 + MIDDLE**2)
    assert terms["walk: statistics"] == pytest.approx(1.7 * sums * tokens / 4e9)
    terms = find_terms(plan, replace(work, compiled_sums=True), PROBE)["quantize"]
    assert terms["walk: statistics"] == pytest.approx(sums * tokens / 4e9)
    assert terms["walk: attention"] == pytest.approx(attention)


def test_what_is_compiled_takes_memory(model: Path) -> None:
    """The second moments of any method that has them, and nothing of plain rounding."""
    for method, more in (("awq", True), ("rtn", False)):
        plan, work = make(model, method)
        least = find_peak(plan, work, 0)
        assert (find_peak(plan, replace(work, compiled_sums=True), 0) > least) == more


def test_operations_of_gptq_are_counted(model: Path) -> None:
    """By hand: one order a matrix, with its factor; 9 products O I^2 with two sweeps, and 4 besides
    for what the output has and how well it is met."""
    plan, work = make(model)

    terms = find_terms(plan, work, PROBE)["solve"]

    cubes = BLOCKS * (3 * HIDDEN**3 + MIDDLE**3)
    rows_by_squares = BLOCKS * (
        (HIDDEN + 2 * KV) * HIDDEN**2
        + HIDDEN * HIDDEN**2
        + 2 * MIDDLE * HIDDEN**2
        + HIDDEN * MIDDLE**2
    )
    assert terms["solve: order"] == pytest.approx(cubes / 1e9)
    assert terms["solve: factor"] == 0.0
    assert terms["solve: products"] == pytest.approx(13 * rows_by_squares / 1e9)
    columns = BLOCKS * (3 * HIDDEN + MIDDLE)
    assert terms["solve: calls"] == pytest.approx(columns * (8 + 9 * 2) * 1e-6)


def test_plain_rounding_walks_nowhere(model: Path) -> None:
    """Blocks are read and rounded; no forward, no statistics, no products."""
    plan, work = make(model, "rtn")

    terms = find_terms(plan, work, PROBE)

    assert terms["solve"] == {}
    assert not {"walk: forward", "walk: statistics"} & set(terms["quantize"])
    assert terms["quantize"]["solve: products"] == 0


def test_every_term_has_a_cost(model: Path) -> None:
    """Also those of a search for schemes and of a pass back through the model."""
    used = set()
    for method in ("rtn", "gptq", "awq", "awq+gptq"):
        plan, work = make(model, method)
        used |= {name for terms in find_terms(plan, work, PROBE).values() for name in terms}

    assert used <= set(COSTS)
    assert all(cost > 0 for cost in COSTS.values())


def test_walk_and_solvers_are_parts_of_quantize(model: Path) -> None:
    """So they do not count twice in the whole."""
    prediction = predict(*make(model), PROBE)

    seconds = prediction.seconds
    assert list(seconds) == ["prepare", "quantize", "calibrate", "solve", "write", "gate"]
    assert 0 < seconds["calibrate"] + seconds["solve"] < seconds["quantize"]
    assert prediction.total_seconds == pytest.approx(
        seconds["prepare"] + seconds["quantize"] + seconds["write"] + seconds["gate"]
    )


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ({"calibration_windows": 64}, "quantize"),
        ({"calibration_length": 256}, "quantize"),
        ({"compute_bytes": 4}, "quantize"),
        ({"gate_windows": 64}, "gate"),
        ({"formats": ("compressed-tensors", "onnx")}, "gate"),
        ({"data_bytes": 9_000_000}, "prepare"),
    ],
)
def test_more_work_takes_longer(model: Path, change: dict[str, Any], stage: str) -> None:
    """In its own stage, and never less memory."""
    plan, work = make(model)
    before, after = (predict(plan, replace(work, **each), PROBE) for each in ({}, change))

    assert after.seconds[stage] > before.seconds[stage]
    assert after.peak_memory_bytes >= before.peak_memory_bytes


def test_a_faster_machine_takes_less(model: Path) -> None:
    """Every stage, but for starts of processes."""
    plan, work = make(model)
    fast = replace(
        PROBE,
        float32_gflops=100.0,
        bfloat16_gflops=400.0,
        moved_bytes_per_second=1e11,
        read_bytes_per_second=1e10,
        hash_bytes_per_second=1e10,
        write_bytes_per_second=1e10,
    )

    slow_seconds, fast_seconds = (
        find_seconds(find_terms(plan, work, probe)) for probe in (PROBE, fast)
    )

    assert all(fast_seconds[stage] < seconds for stage, seconds in slow_seconds.items())


def test_what_cannot_be_measured_is_foretold_all_the_same(model: Path) -> None:
    """Where nothing could be written or read the numbers stay finite."""
    probe = replace(PROBE, write_bytes_per_second=0.0, read_bytes_per_second=0.0)

    assert all(math.isfinite(value) for value in predict(*make(model), probe).seconds.values())


def test_memory_grows_by_what_the_forwards_hold(model: Path) -> None:
    """By hand: in front of o_proj six widths wait of each token: the residual stream, the input
    of attention, queries, keys and values, and what attention gives."""
    plan, work = make(model, calibration_windows=4096, calibration_length=1024)
    more = replace(work, calibration_windows=8192)

    grown = find_peak(plan, more, 0) - find_peak(plan, work, 0)

    width = HIDDEN + HIDDEN + (HIDDEN + 2 * KV) + HIDDEN
    held = 4096 * 1024 * width * 2
    # Four windows a forward.
    stacks = 4096 / 4 * 1.5e6
    assert 1.0 * (held + stacks) < grown < 1.7 * (held + stacks)


def test_the_memory_of_an_accelerator_is_told_apart(model: Path) -> None:
    """Suspended forwards and statistics are there, and no longer in the process's memory."""
    plan, work = make(model, calibration_windows=4096)
    there = replace(work, on_device=True)

    assert find_device_peak(plan, work) is None
    on_device = find_device_peak(plan, there)
    assert on_device is not None
    assert on_device > 4096 * 64 * 4 * HIDDEN * 2
    more = find_device_peak(plan, replace(there, calibration_windows=8192))
    assert more is not None
    assert more > on_device


def test_too_little_memory_is_a_note(model: Path) -> None:
    """With what can be lowered; and nothing where there is enough, or where nobody knows."""
    plan, work = make(model)
    scarce = replace(PROBE, free_memory_bytes=4_000_000)
    device = AcceleratorProbe("GPU", 10_000_000, 1_000, 1e5, 1e4, 1e10)

    assert predict(plan, work, PROBE).notes == ()
    assert predict(plan, work, replace(PROBE, free_memory_bytes=0)).notes == ()
    (note,) = predict(plan, work, scarce).notes
    assert "calibration.samples" in note
    assert "of memory, and 0.00 GB are free" in note
    on_device = replace(work, on_device=True)
    notes = predict(plan, on_device, replace(PROBE, accelerator=device)).notes
    assert [("parked in RAM" in note, "the GPU's memory" in note) for note in notes] == [
        (True, False),
        (False, True),
    ]


def test_what_has_no_room_is_parked_in_a_file(model: Path) -> None:
    """Then memory stays, and the disk has it."""
    plan, work = make(model, calibration_windows=1 << 15)
    plan = replace(plan, activation_bytes=1_000_000_000)
    ample = replace(PROBE, free_memory_bytes=0)
    scarce = replace(PROBE, free_memory_bytes=600_000_000)

    before, after = (predict(plan, work, probe) for probe in (ample, scarce))

    assert after.peak_memory_bytes < before.peak_memory_bytes
    assert after.disk_bytes == before.disk_bytes + 700_000_000
    assert "parked in a file" in after.notes[0]


def test_a_bound_for_memory_leaves_activations_what_the_rest_does(model: Path) -> None:
    """As much as keeps the peak below it; the file has the others."""
    plan, work = make(model, calibration_windows=1 << 15)
    plan = replace(plan, activation_bytes=2_000_000_000)
    free = predict(plan, work, PROBE)
    whole = replace(work, room_bytes=plan.activation_bytes)
    most = find_peak(plan, whole, PROBE.resident_bytes)
    assert free.room_bytes is None
    # Less is kept for the next use under a limit, which here is more than its holes.
    assert free.peak_memory_bytes > most

    for bound in (most, most + 1):
        assert predict(plan, work, PROBE, bound) == replace(free, peak_memory_bytes=most)
    bound = most - 50_000_000
    found = predict(plan, work, PROBE, bound)

    assert bound - 10 <= found.peak_memory_bytes <= bound
    room = found.room_bytes
    assert room is not None
    assert found.disk_bytes == free.disk_bytes + plan.activation_bytes - room
    more = find_peak(plan, replace(work, room_bytes=room + 10), PROBE.resident_bytes)
    assert more > bound
    assert "parked in a file" in found.notes[0]


def test_no_block_is_read_ahead_where_activations_are_parked_in_a_file(model: Path) -> None:
    """A block less is held, and foretold; out of a GPU they go to RAM, and blocks come ahead."""
    plan, work = make(model, calibration_windows=1 << 15)
    size = 400_000_000
    work = replace(work, model=replace(work.model, block_bytes=size))
    needed = plan.activation_bytes
    fits, parked = (
        find_peak(plan, replace(work, room_bytes=room), 0) for room in (needed, needed - 1)
    )
    foretold = predict(plan, work, PROBE)

    assert fits - parked == pytest.approx(1.1 * size, rel=1e-6)
    assert foretold.room_bytes is None
    assert blocks_ahead(replace(plan, prediction=foretold)) == 1
    tight = replace(foretold, room_bytes=needed - 1)
    assert blocks_ahead(replace(plan, prediction=tight)) == 0
    on_gpu = replace(tight, device_memory_bytes=1)
    assert blocks_ahead(replace(plan, prediction=on_gpu)) == 1


def test_a_bound_holds_for_what_is_parked_out_of_a_gpu(model: Path) -> None:
    """RAM takes as much of it as the bound leaves."""
    plan, work = make(model, calibration_windows=1 << 15)
    plan, work = replace(plan, activation_bytes=1_000_000_000), replace(work, on_device=True)
    device = AcceleratorProbe("GPU", 4_000_000_000, 1_600_000_000, 1e5, 1e4, 1e10)
    probe = replace(PROBE, accelerator=device)
    free = predict(plan, work, probe)

    found = predict(plan, work, probe, free.peak_memory_bytes - 150_000_000)

    assert (free.room_bytes, found.room_bytes) == (None, 50_000_000)
    assert found.peak_memory_bytes == free.peak_memory_bytes - 150_000_000
    assert found.disk_bytes == free.disk_bytes + 150_000_000


def test_a_bound_below_what_the_rest_takes_is_refused(model: Path) -> None:
    """With how much that is, which is then enough."""
    plan, work = make(model, calibration_windows=1 << 15)
    plan = replace(plan, activation_bytes=1_000_000_000)

    with pytest.raises(ResourceError, match=r"0.50 GB are too little: .* give at least 1.65GB"):
        predict(plan, work, PROBE, 500_000_000)

    assert predict(plan, work, PROBE, 1_650_000_000).peak_memory_bytes <= 1_650_000_000
    least = find_peak(plan, replace(work, room_bytes=0), PROBE.resident_bytes)
    assert predict(plan, work, PROBE, least).peak_memory_bytes == least
    with pytest.raises(ResourceError):
        predict(plan, work, PROBE, least - 1)


def test_a_resume_compares_no_predictions(model: Path) -> None:
    """Nor does a plan differ by what was measured."""
    plan, work = make(model)
    foretold = replace(plan, prediction=predict(plan, work, PROBE))

    assert describe_plan(foretold) == describe_plan(plan)
    assert foretold == plan


def test_the_probe_measures_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    """In an output's folder that is not there yet."""
    files = sorted(model.glob("*.safetensors"))
    start = time.perf_counter()

    probe = probe_machine(files, tmp_path / "not" / "there", torch.device("cpu"), 5)

    assert time.perf_counter() - start < 30
    assert (probe.accelerator, probe.free_memory_bytes) == (None, 5)
    assert all(value > 0 for name, value in vars(probe).items() if name != "accelerator")
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == probe.threads


def test_plan_and_report_have_the_prediction(tmp_path: Path) -> None:
    """The same keys in both; the report says it beside what was measured."""
    recipe = make_pico_job(tmp_path, quantize={"method": "gptq", "group_size": 32})

    plan = plan_job(recipe, open_checkpoint(resolve_source(recipe.model or "")), gate=False)
    result = quantkit.quantize(recipe, gate=False)

    assert plan.prediction is not None
    timings = json.loads((tmp_path / "out" / "quantkit.json").read_text())["timings"]
    predicted = timings["predicted"]
    assert set(predicted["seconds"]) == set(plan.prediction.seconds)
    assert predicted["seconds"]["gate"] == 0
    assert set(timings["seconds"]) <= set(predicted["seconds"])
    assert predicted["peak_memory_bytes"] > 100_000_000
    assert isinstance(result.plan, Plan)
    assert result.plan.prediction is not None
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "| Stage | Predicted | Measured |" in text
    assert "Predicted and measured" in (tmp_path / "out" / "report" / "report.html").read_text()
