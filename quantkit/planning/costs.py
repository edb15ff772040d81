"""How long the stages of a job take: counts of operations, and how fast this machine does them.

Each term of a stage is what it would take at the speeds of the probe. `COSTS` says by how much it
takes longer, found by measuring jobs (benchmarks/predictions.py); a term in seconds is one where
the probe says nothing, such as the start of a process.

Letters of shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from quantkit.numerics.batching import count_micro_batches
from quantkit.numerics.joint_cheapest import suits_loops
from quantkit.planning.groups import SolvedMatrix, block_weights, solved_matrices
from quantkit.planning.workload import Workload
from quantkit.records import GroupPlan, MachineProbe, Plan
from quantkit.schemes import ONNX

COSTS: Mapping[str, float] = MappingProxyType(
    {
        "prepare: start": 0.1,
        "prepare: probe": 0.2,
        "prepare: text": 0.5,
        "prepare: hash": 1.0,
        "walk: start": 0.4,
        "walk: read": 2.4,
        "walk: forward": 1.4,
        "walk: attention": 2.4,
        "walk: elements": 1.1,
        "walk: calls": 10.0,
        "walk: statistics": 1.05,
        "solve: order": 0.35,
        "solve: factor": 0.2,
        "solve: products": 1.0,
        "solve: elements": 2.8,
        "solve: calls": 1.5,
        "encode: elements": 0.8,
        "store": 2.0,
        "write: start": 0.07,
        "write: bytes": 2.0,
        "write: onnx": 0.2,
        "gate: start": 11.0,
        "gate: weights": 2.0,
        "gate: forward": 1.8,
        "gate: logits": 3.1,
        "gate: prompts": 1.7,
        "fisher: passes": 3.0,
        "allocate: passes": 1.5,
    }
)
"""Term -> how many times its ideal seconds it takes, or seconds."""

_WIDENED = 1.7
"""How many times longer second moments take where torch sums them in float32."""

_ATTENTION_OF_TORCH = 4.5
"""How many times longer attention takes in bfloat16 where it is torch's."""

_UNMEASURED_WRITING = 200e6
"""Bytes a second where the probe could not write."""

_CHECKED_PASSES = 3
"""How often a tensor that is read goes through memory: read, looked at, cast."""

_SAMPLED_TOKENS = 1024
"""Tokens on which schemes with rounded inputs are measured."""

_SEARCHED_ELEMENTS = 1 << 19
"""Of a joint search for scales at a time."""

_GENERATED = 64
"""Tokens of the gate's continuations."""

_CALLS_A_LAYER = 30
"""Calls of torch in a block's forward."""

Terms = Mapping[str, float]


def find_terms(plan: Plan, work: Workload, probe: MachineProbe) -> Mapping[str, Terms]:
    """Return stage -> term -> its ideal seconds. `calibrate` and `solve` are part of `quantize`."""
    walk, solve = _count_walk(plan, work, probe), _count_solving(plan, work, probe)
    quantize = {**walk, **solve, "store": _count_stored(plan) / _writing(probe)}
    stages = {"prepare": _count_preparing(work, probe)}
    if plan.choice is not None:
        stages["allocate"] = _count_measuring(plan, work, probe)
    return {
        **stages,
        "quantize": quantize,
        "calibrate": walk if work.tokens else {},
        "solve": solve if work.tokens else {},
        "write": _count_writing(plan, work, probe),
        "gate": _count_judging(plan, work, probe),
    }


def find_seconds(terms: Mapping[str, Terms]) -> dict[str, float]:
    """Return stage -> seconds."""
    return {
        stage: sum(COSTS[name] * ideal for name, ideal in each.items())
        for stage, each in terms.items()
    }


def _count_preparing(work: Workload, probe: MachineProbe) -> Terms:
    read = min(probe.hash_bytes_per_second, probe.read_bytes_per_second or float("inf"))
    return {
        "prepare: start": 1.0,
        "prepare: probe": 1.0,
        "prepare: text": work.data_bytes / 1e6,
        "prepare: hash": work.model.file_bytes / read,
    }


def _count_walk(plan: Plan, work: Workload, probe: MachineProbe) -> Terms:
    """Reading the blocks and, with calibration, the forward and the sums over its inputs."""
    model = work.model
    blocks = len(plan.blocks)
    read = blocks * model.block_bytes + (model.outside_bytes if work.tokens else 0)
    rate = probe.read_bytes_per_second or probe.moved_bytes_per_second
    reading = {"walk: read": read / rate + _CHECKED_PASSES * read / probe.moved_bytes_per_second}
    if not work.tokens:
        return reading
    tokens, length = work.tokens, work.calibration_length
    weights = sum(map(block_weights, plan.blocks))
    sums = sum(
        group.linears[0].in_features ** 2
        * (3 if any(linear.looks_at_whole_model for linear in group.linears) else 1)
        for block in plan.blocks
        for group in block.groups
        if any(linear.needs_statistics for linear in group.linears)
    )
    follows = 2 if any(block.looks_at_whole_model for block in plan.blocks) else 1
    batches = count_micro_batches(
        work.calibration_windows, model.hidden, length, on_device=work.on_device
    )
    flops = matmul_speed(work, probe)
    width = sum(linear.out_features for block in plan.blocks for linear in block.linears)
    slower = 1.0 if work.compiled_sums or work.compute_bytes != 2 else _ATTENTION_OF_TORCH
    terms = {
        **reading,
        "walk: start": 1.0,
        "walk: forward": follows * 2 * weights * tokens / flops,
        "walk: attention": follows * 2 * tokens * length * model.hidden * blocks / flops * slower,
        "walk: elements": follows
        * tokens
        * (4 * width + 16 * model.hidden * blocks)
        * work.compute_bytes
        / probe.moved_bytes_per_second,
        "walk: calls": follows * batches * blocks * _CALLS_A_LAYER * probe.call_seconds * 10,
        "walk: statistics": sums * tokens / flops * (1.0 if work.compiled_sums else _WIDENED),
    }
    if follows > 1:
        seen = min(tokens, 1 << 15)
        terms["fisher: passes"] = 6 * weights * seen / (probe.float32_gflops * 1e9)
    return terms


def matmul_speed(work: Workload, probe: MachineProbe) -> float:
    """Operations a second of the forward's products."""
    if work.on_device and probe.accelerator is not None:
        device = probe.accelerator
        return 1e9 * (device.bfloat16_gflops if work.compute_bytes == 2 else device.float32_gflops)
    return 1e9 * (probe.bfloat16_gflops if work.compute_bytes == 2 else probe.float32_gflops)


def _count_solving(plan: Plan, work: Workload, probe: MachineProbe) -> Terms:
    totals = dict.fromkeys(
        (
            "solve: order",
            "solve: factor",
            "solve: products",
            "solve: elements",
            "solve: calls",
            "encode: elements",
        ),
        0.0,
    )
    for block in plan.blocks:
        for group in block.groups:
            for matrix in solved_matrices(group):
                _add(totals, _count_matrix(matrix, work))
            totals["encode: elements"] += _count_encoding(group)
            totals["solve: calls"] += sum(
                100 * linear.in_features * len(linear.ggml_types)
                for linear in group.linears
                if linear.needs_statistics
            )
    flops = 1e9 * probe.float32_gflops
    if work.on_device and probe.accelerator is not None:
        flops = 1e9 * probe.accelerator.float32_gflops
    factored = flops if work.on_device else 1e9 * probe.cholesky_gflops
    moved = probe.moved_bytes_per_second * (flops / probe.float32_gflops / 1e9)
    return {
        "solve: order": totals["solve: order"] / flops,
        "solve: factor": totals["solve: factor"] / factored,
        "solve: products": totals["solve: products"] / flops,
        "solve: elements": totals["solve: elements"] / moved,
        "solve: calls": totals["solve: calls"] * probe.call_seconds,
        "encode: elements": totals["encode: elements"] / moved,
    }


def _add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        totals[name] += value


def _count_matrix(matrix: SolvedMatrix, work: Workload) -> Mapping[str, float]:
    """Operations, bytes and calls that solving a matrix takes; see solvers/."""
    first, columns, elements = matrix.first, matrix.columns, matrix.elements
    method, sweeps = first.method, first.effort.polish_sweeps
    square = float(elements) * columns
    tried = _count_candidates(first.scheme.weight_bits, first.scheme.weight_kind)
    tried *= 1 if first.scheme.symmetric else 3
    found = dict.fromkeys(
        ("solve: order", "solve: factor", "solve: products", "solve: elements", "solve: calls"), 0.0
    )
    # Plain rounding, decoding and the errors of the weights.
    found["solve: elements"] += 105 * elements * 4
    if not method.needs_calibration:
        return found
    # What the output has, and how well it is met.
    found["solve: products"] += 4 * square
    if first.scheme.activations is not None:
        # Outputs of sampled tokens with rounded inputs: before and after, original and decoded.
        found["solve: products"] += 8.0 * _SAMPLED_TOKENS * elements
    if method.transform is not None:
        rows = 40 * 64 * columns
        found["solve: products"] += 4 * rows * columns
        found["solve: elements"] += rows * 4 * 60
        if method.rounder == "gptq":
            found["solve: factor"] += columns**3 / 3
            found["solve: elements"] += rows * 4 * 64
            found["solve: calls"] += 8 * columns * -(-rows // (1 << 21))
    if method.rounder in ("rtn", "custom"):
        # How long a custom solver takes is not known; a note of the plan says so.
        return found
    if method.rounder == "search":
        group = first.group_size or columns
        found["solve: products"] += max(1, sweeps) * 2 * square
        # One half of H of the group, where loops do it; else all of it, and passes over memory.
        by_loops = work.compiled and not work.on_device and suits_loops(first.scheme, group)
        products, passes, calls = (1.0, 14, 0) if by_loops else (2.0, 70, 12)
        found["solve: products"] += max(1, sweeps) * tried * products * elements * group
        found["solve: elements"] += max(1, sweeps) * tried * passes * elements * 4
        parts = -(-elements // _SEARCHED_ELEMENTS) * -(-columns // group)
        found["solve: calls"] += max(1, sweeps) * (tried * calls + 40) * parts
        return found
    # The factor comes with the order.
    found["solve: order"] += float(columns) ** 3
    # Floating-point codes are rounded by way of their exponents.
    passes = 30 if first.scheme.weight_kind == "float" else 10
    found["solve: elements"] += tried * passes * elements * 4
    found["solve: products"] += square * (5 + 2 * sweeps)
    # Within a block of 128 columns each one's error goes to those that are left.
    found["solve: elements"] += elements * 4 * 64 * (first.effort.beam_width + 2 * sweeps)
    found["solve: calls"] += columns * (8 * first.effort.beam_width + 9 * sweeps)
    return found


def _count_candidates(bits: int, kind: str) -> int:
    """Scales that a search tries for each group."""
    if kind == "float":
        return 32
    return 16 if bits <= 4 else 28


def _count_encoding(group: GroupPlan) -> float:
    """Bytes that the search for the codes of GGUF files moves."""
    found = 0.0
    for linear in group.linears:
        for _ in linear.ggml_types:
            elements = linear.out_features * linear.in_features
            found += 4 * elements * (10_000 if linear.needs_statistics else 4_000)
    return found


def _count_stored(plan: Plan) -> float:
    """Bytes of the solved blocks in the workspace: a byte a code, and each encoded tensor."""
    codes = sum(each.out_features * each.in_features for each in plan.linears if each.quantized)
    return codes + sum(file.tensor_bytes for file in plan.gguf)


def _writing(probe: MachineProbe) -> float:
    """Bytes a second to the disk; each is hashed too."""
    rate = probe.write_bytes_per_second or _UNMEASURED_WRITING
    return 1 / (1 / rate + 1 / probe.hash_bytes_per_second)


def _count_writing(plan: Plan, work: Workload, probe: MachineProbe) -> Terms:
    files = sum(file.tensor_bytes for file in plan.gguf)
    graphs = sum(graph.tensor_bytes for graph in plan.onnx)
    plain = [each for each in work.formats if each not in ("gguf", ONNX)]
    written = files + graphs + len(plain) * plan.artifact_bytes
    return {
        "write: start": float(len(work.formats)),
        "write: bytes": written / _writing(probe)
        + len(work.formats) * 16 * plan.parameters / probe.moved_bytes_per_second,
        "write: onnx": float(len(plan.onnx)),
    }


def _count_judging(plan: Plan, work: Workload, probe: MachineProbe) -> Terms:
    """Two workers on all windows, for every artifact; the first look alone."""
    if not work.gate_windows:
        return {}
    times, model = len(work.formats), work.model
    inside = sum(map(block_weights, plan.blocks))
    weights = inside + model.vocabulary * model.hidden
    tokens, flops = work.gate_tokens, 1e9 * probe.float32_gflops
    if probe.accelerator is not None and work.on_device:
        flops = 1e9 * probe.accelerator.bfloat16_gflops
    moved = probe.moved_bytes_per_second
    terms = {
        "gate: start": 1.0,
        "gate: weights": 100.0 * plan.parameters / moved,
        "gate: forward": 4 * weights * tokens / flops,
        "gate: logits": 100.0 * tokens * model.vocabulary / moved,
    }
    if work.probed:
        calls = len(plan.blocks) * _CALLS_A_LAYER * probe.call_seconds * 10
        terms["gate: prompts"] = 6 * _GENERATED * (calls + 8.0 * weights / moved)
    return {name: times * ideal for name, ideal in terms.items()}


def _count_measuring(plan: Plan, work: Workload, probe: MachineProbe) -> Terms:
    """A run of the blocks behind each unit for each of its candidates."""
    if plan.choice is None:
        return {}
    choice, blocks = plan.choice, len(plan.blocks)
    block = sum(map(block_weights, plan.blocks)) / max(1, blocks)
    tokens = choice.windows * choice.window_tokens
    head = work.model.vocabulary * work.model.hidden
    products = 0.0
    for unit in choice.units:
        behind = blocks - unit.block
        products += len(unit.candidates) * 2 * tokens * (behind * block + head)
    return {"allocate: passes": products / (1e9 * probe.float32_gflops)}
