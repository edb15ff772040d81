"""A job made ready: everything that can be refused is refused here, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.compute import ComputeProbe, choose_compute_dtype, choose_device
from quantkit.calibration.data import load_tokenizer
from quantkit.calibration.parking import free_ram
from quantkit.calibration.stored import StoredStatistics, check_holds, check_model, note_origin
from quantkit.calibration.tokenizer import check_tokenizer_there
from quantkit.checkpoint.reader import Checkpoint, hash_files
from quantkit.describe import describe_model, describe_plan, describe_windows, package_versions
from quantkit.differing import list_differences
from quantkit.errors import InputError
from quantkit.exports import plan_gguf_files, plan_onnx_graphs
from quantkit.inputs import LoadedRecipe
from quantkit.job_windows import collect_notes, find_calibration, load_evaluation
from quantkit.numerics.columns import missing_compiler
from quantkit.numerics.kernels import missing_kernels
from quantkit.numerics.products import sums_products
from quantkit.planning import find_chosen, make_plan
from quantkit.planning.prediction import predict
from quantkit.planning.probe import probe_machine
from quantkit.planning.workload import Workload, measure_model
from quantkit.ranks import Ranks, from_first, gather
from quantkit.recipe import Recipe
from quantkit.records import (
    Allocation,
    GgufPlan,
    LinearPlan,
    MachineProbe,
    Plan,
    TokenWindows,
)
from quantkit.schemes import METHODS, Method

_MEASURED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The dtypes that a CPU is measured in."""


@dataclass(frozen=True)
class Job:
    """What all stages of a job need."""

    loaded: LoadedRecipe
    checkpoint: Checkpoint
    plan: Plan
    calibration: TokenWindows | None
    evaluation: TokenWindows | None
    device: torch.device
    dtype: torch.dtype
    probe: ComputeProbe | None
    model_files: Mapping[str, str]
    """File name -> sha256."""
    notes: tuple[str, ...]
    """What was noticed and did not stop the job."""
    processes: int = 1
    """That share the calibration and the solving."""
    statistics: StoredStatistics | None = None
    """Of the original model, which the blocks are solved from; None: they are taken on the way."""

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales in the artifact."""
        dtype: torch.dtype = getattr(torch, self.plan.scale_dtype)
        return dtype


def prepare(
    loaded: LoadedRecipe,
    checkpoint: Checkpoint,
    *,
    device: str,
    gate: bool,
    memory: int | None = None,
    examples: Iterable[object] | None = None,
    statistics: StoredStatistics | None = None,
) -> Job:
    """Plan, and read all data.

    Args:
        memory: bytes that the job's process may hold; None: as much as it takes.
        examples: of the caller, to calibrate on in place of the recipe's data.
        statistics: to solve the blocks from in place of a walk.

    Raises:
        InputError, ResourceError: whatever would stop the job later.
    """
    recipe = loaded.recipe
    chosen_device = choose_device(device)
    plan = plan_work(recipe, checkpoint, gate=gate, methods=loaded.methods)
    machine = _probe(recipe, checkpoint, chosen_device)
    model_files = hash_files(checkpoint)
    calibration = evaluation = None
    dtype, probe = _choose_dtype(plan, chosen_device)
    if not needs_calibration(plan):
        statistics = None
    elif statistics is not None:
        check_model(statistics, checkpoint.source.name, model_files)
        check_holds(statistics, plan)
        calibration, dtype, probe = statistics.windows, statistics.dtype, None
    elif recipe.calibration is not None:
        calibration = find_calibration(recipe.calibration, checkpoint, plan, examples)
    if gate and recipe.gate is not None:
        tokenizer = load_tokenizer(checkpoint.source.folder)
        evaluation = load_evaluation(recipe.gate, tokenizer, checkpoint)
    work = describe_workload(recipe, checkpoint, plan, chosen_device, dtype, gate=gate)
    work = replace(
        work,
        calibration_windows=0 if calibration is None or statistics else len(calibration.ids),
        gate_windows=min(work.gate_windows, 0 if evaluation is None else len(evaluation.ids)),
    )
    return Job(
        loaded=loaded,
        checkpoint=checkpoint,
        plan=replace(plan, prediction=predict(plan, work, machine, memory)),
        calibration=calibration,
        evaluation=evaluation,
        device=chosen_device,
        dtype=dtype,
        probe=probe,
        model_files=model_files,
        statistics=statistics,
        notes=(
            *plan.notes,
            *([] if statistics is None else note_origin(statistics, plan)),
            *_note_kernels(plan, chosen_device),
            *collect_notes(calibration, evaluation),
        ),
    )


def _note_kernels(plan: Plan, device: torch.device) -> list[str]:
    """What makes solving slower than it could be.

    Raises:
        QuantkitError: a kernel does not work on this GPU.
    """
    notes = list(missing_kernels(device)) if needs_calibration(plan) else []
    if device.type == "cpu" and any(linear.method.rounder == "gptq" for linear in plan.linears):
        notes += filter(None, [missing_compiler()])
    return notes


def plan_job(
    recipe: Recipe,
    checkpoint: Checkpoint,
    *,
    gate: bool = True,
    device: str = "auto",
    memory: int | None = None,
    methods: Mapping[str, Method] = METHODS,
) -> Plan:
    """Say what a job will do, its GGUF files and ONNX graphs included, and what it will take.

    The machine is measured for about a second; no data and, but for a few MiB to see how fast they
    come, no weights are read.

    Args:
        device: `auto`, `cpu` or `cuda`.
        memory: bytes that the job's process may hold; None: as much as it takes.
        methods: that the recipe may name.

    Raises:
        InputError, ResourceError: as `make_plan`; or the checkpoint cannot become a GGUF file or
            an ONNX graph; or there is no such device, or no tokenizer for the recipe's texts.
    """
    chosen = choose_device(device)
    if recipe.calibration is not None or (gate and recipe.gate is not None):
        check_tokenizer_there(checkpoint.source.folder)
    plan = plan_work(recipe, checkpoint, gate=gate, methods=methods)
    work = describe_workload(
        recipe, checkpoint, plan, chosen, _choose_dtype(plan, chosen)[0], gate=gate
    )
    machine = _probe(recipe, checkpoint, chosen)
    return replace(plan, prediction=predict(plan, work, machine, memory))


def plan_work(
    recipe: Recipe,
    checkpoint: Checkpoint,
    *,
    gate: bool,
    methods: Mapping[str, Method] = METHODS,
) -> Plan:
    """Say what a job will do, without measuring what it will take.

    Raises:
        InputError, ResourceError: as `plan_job`.
    """
    files, graphs = _plan_files(recipe, checkpoint), plan_onnx_graphs(recipe.export, checkpoint)
    return make_plan(recipe, checkpoint, gate=gate, gguf=files, onnx=graphs, methods=methods)


def _choose_dtype(plan: Plan, device: torch.device) -> tuple[torch.dtype, ComputeProbe | None]:
    """The dtype of the forward passes, measured where there are any."""
    if not needs_calibration(plan):
        return torch.float32, None
    return choose_compute_dtype(device, getattr(torch, plan.scale_dtype))


def _probe(recipe: Recipe, checkpoint: Checkpoint, device: torch.device) -> MachineProbe:
    files = sorted({info.file for info in checkpoint.tensors.values()})
    output = None if recipe.output is None else Path(recipe.output)
    return probe_machine(files, output, device, free_ram() or 0)


def describe_workload(
    recipe: Recipe,
    checkpoint: Checkpoint,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    *,
    gate: bool,
) -> Workload:
    """Return the numbers of a job besides its plan, as far as the recipe says them.

    Args:
        dtype: of the forward passes.
        gate: whether the artifacts are judged.
    """
    calibration = recipe.calibration if needs_calibration(plan) else None
    judging = recipe.gate if gate else None
    texts = [Path(spec.data) for spec in (calibration, judging) if spec is not None]
    return Workload(
        model=measure_model(checkpoint, plan),
        calibration_windows=0 if calibration is None else calibration.samples,
        calibration_length=0 if calibration is None else calibration.sequence_length,
        gate_windows=0 if judging is None else judging.samples,
        gate_length=0 if judging is None else judging.sequence_length,
        probed=judging is not None and judging.probes is not None,
        formats=tuple(export.format for export in recipe.export),
        data_bytes=sum(path.stat().st_size for path in texts if path.is_file()),
        compute_bytes=dtype.itemsize,
        on_device=device.type == "cuda",
        compiled=find_spec("numba") is not None,
        compiled_sums=dtype == torch.bfloat16 and sums_products(device),
    )


def _plan_files(
    recipe: Recipe, checkpoint: Checkpoint, chosen: Mapping[str, str] | None = None
) -> tuple[GgufPlan, ...]:
    weighed = recipe.quantize.method != "rtn"
    return plan_gguf_files(recipe.export, checkpoint, chosen, has_importance=weighed)


def settle(job: Job, allocation: Allocation) -> Job:
    """Return the job with the schemes or types chosen that its plan left open.

    Raises:
        InputError, ResourceError: as `make_plan`.
    """
    gate = job.evaluation is not None
    recipe = job.loaded.recipe
    chosen = {f"{name}.weight": choice for name, choice in find_chosen(allocation).items()}
    plan = make_plan(
        recipe,
        job.checkpoint,
        gate=gate,
        allocation=allocation,
        gguf=_plan_files(recipe, job.checkpoint, chosen),
        onnx=plan_onnx_graphs(recipe.export, job.checkpoint),
        methods=job.loaded.methods,
    )
    others = (note for note in job.notes if note not in job.plan.notes)
    plan = replace(plan, prediction=job.plan.prediction)
    return replace(job, plan=plan, notes=(*plan.notes, *others))


def needs_calibration(plan: Plan) -> bool:
    """Whether anything of the plan looks at calibration data."""
    return bool(_calibrated(plan)) or plan.kv_cache is not None or plan.choice is not None


def _calibrated(plan: Plan) -> list[LinearPlan]:
    return [linear for linear in plan.linears if linear.needs_statistics]


def depends_on(job: Job) -> dict[str, Any]:
    """What the solved blocks depend on: a resumed job must agree in all of it."""
    found = {
        "model": describe_model(job.checkpoint.source, job.model_files)["files"],
        "plan": describe_plan(job.plan),
        "calibration": describe_windows(job.calibration),
        "compute": describe_compute(job),
        "versions": package_versions(),
    }
    return found if job.statistics is None else found | {"statistics": job.statistics.sha256}


def go_on(job: Job, begun: Mapping[str, Any]) -> Job:
    """Return the job in the dtype that the unfinished one was begun with.

    On a CPU it is chosen by measuring, which may turn out otherwise on another day.

    Args:
        begun: as of `depends_on`; empty where no job is to be gone on with.
    """
    compute = begun.get("compute")
    if job.probe is None or job.device.type != "cpu" or not isinstance(compute, Mapping):
        return job
    dtype = _MEASURED.get(str(compute.get("dtype")))
    if dtype is None or compute.get("device") != job.device.type:
        return job
    return replace(job, dtype=dtype)


def describe_compute(job: Job) -> dict[str, Any]:
    """Where and in which dtype the forward passes ran, and in how many processes.

    Each process adds up its own tokens first, so their number decides the last bits of the sums.
    """
    return {
        "device": job.device.type,
        "dtype": str(job.dtype).removeprefix("torch."),
        "processes": job.processes,
    }


def agree(job: Job, ranks: Ranks) -> Job:
    """Return the job as all ranks do it: what depends on speed is as on the first one.

    Raises:
        InputError: the ranks have different models, data, devices or packages.
    """
    if ranks.size == 1:
        return job
    dtype, probe = from_first(ranks, lambda: (job.dtype, job.probe))
    processes = ranks.size if needs_calibration(job.plan) else 1
    job = replace(job, dtype=dtype, probe=probe, processes=processes)
    first, *others = gather(ranks, depends_on(job))
    for number, other in enumerate(others, start=1):
        differences = list_differences(first, other)
        if differences:
            raise InputError(
                f"process {number} has something else than process 0: {'; '.join(differences)}; "
                f"all machines need the same model, data and packages"
            )
    return replace(job, notes=(*job.notes, _describe_sharing(job.plan, ranks)))


def _describe_sharing(whole: Plan, ranks: Ranks) -> str:
    """Say what several processes do together, and what one does alone."""
    if not needs_calibration(whole):
        return f"one of {ranks.size} processes did the work: nothing of it needs calibration"
    alone = ["wrote and judged"]
    if any(block.looks_at_whole_model for block in whole.blocks):
        alone = ["measured the Fisher matrices", "rounded under them", *alone]
    if whole.choice is not None:
        alone = ["chose what is auto", *alone]
    return (
        f"{ranks.size} processes shared the calibration windows and the rows that were rounded; "
        f"one alone chose the scales of inputs, {', '.join(alone)}"
    )
