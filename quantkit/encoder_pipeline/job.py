"""An encoder's job made ready: everything that can be refused is refused here, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.calibration.compute import choose_device
from quantkit.calibration.doctor import TOKENS_PER_INPUT
from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint, hash_files
from quantkit.describe import describe_model, describe_texts, package_versions
from quantkit.encoders.data import Order, check_shared_texts, load_rows
from quantkit.encoders.planning import looks_at_texts, plan_exports
from quantkit.errors import CalibrationError, RecipeError
from quantkit.formats.onnx.packages import ENCODERS, require_onnx
from quantkit.gating import check_interpreter
from quantkit.inputs import LoadedRecipe
from quantkit.recipe import CalibrationSpec, ExportSpec, GateSpec
from quantkit.records import EncoderInfo, EncoderPlan, LinearPlan, TextRows
from quantkit.schemes import ONNX

INT8 = "int8"


@dataclass(frozen=True)
class EncoderJob:
    """What all stages of an encoder's job need. plans: one for each export of the recipe."""

    loaded: LoadedRecipe
    checkpoint: Checkpoint
    plans: tuple[EncoderPlan, ...]
    calibration: TextRows | None
    evaluation: TextRows | None
    device: torch.device
    """Of the gate; calibration and solving are on the CPU."""
    model_files: Mapping[str, str]
    """File name -> sha256."""
    notes: tuple[str, ...]
    """What was noticed and did not stop the job."""

    @property
    def info(self) -> EncoderInfo:
        """What the model is."""
        return self.plans[0].info

    @property
    def leading(self) -> int:
        """Number of the export that the job's plan is about: INT8, else the first."""
        found = [number for number, plan in enumerate(self.plans) if plan.precision == INT8]
        return found[0] if found else 0


def prepare_encoder(
    loaded: LoadedRecipe, checkpoint: Checkpoint, *, device: str, gate: bool
) -> EncoderJob:
    """Plan, look for the packages, and read all texts.

    Raises:
        InputError, ResourceError: whatever would stop the job later.
    """
    recipe = loaded.recipe
    chosen_device = choose_device(device)
    plans = plan_exports(recipe, checkpoint, gate=gate)
    require_onnx(ENCODERS)
    if gate and recipe.gate is not None:
        check_interpreter(recipe.gate, ONNX)
    info = plans[0].info
    calibration = evaluation = None
    calibrated = _uses_texts(recipe.export, plans)
    if (calibrated and recipe.calibration is not None) or gate:
        tokenizer = load_tokenizer(checkpoint.source.folder)
    if calibrated and recipe.calibration is not None:
        calibration = load_calibration_rows(recipe.calibration, tokenizer, checkpoint, info)
    if gate and recipe.gate is not None:
        evaluation = load_evaluation_rows(recipe.gate, tokenizer, checkpoint, info)
    notes = [note for plan in plans for note in plan.notes]
    notes += _check_rows(calibration, evaluation, plans)
    return EncoderJob(
        loaded=loaded,
        checkpoint=checkpoint,
        plans=plans,
        calibration=calibration,
        evaluation=evaluation,
        device=chosen_device,
        model_files=hash_files(checkpoint),
        notes=tuple(dict.fromkeys(notes)),
    )


def load_calibration_rows(
    spec: CalibrationSpec, tokenizer: Any, checkpoint: Checkpoint, info: EncoderInfo
) -> TextRows:
    """Return texts drawn by the seed.

    Raises:
        CalibrationError: the data cannot be used, or the tokenizer is not the model's.
    """
    return _load_rows(spec, tokenizer, checkpoint, info, None, "random")


def load_evaluation_rows(
    spec: GateSpec, tokenizer: Any, checkpoint: Checkpoint, info: EncoderInfo
) -> TextRows:
    """Return the first texts of the gate's data.

    Raises:
        CalibrationError: the data cannot be used, or the tokenizer is not the model's.
        RecipeError: the gate asks for what is about decoders.
    """
    _refuse_decoders_keys(spec)
    return _load_rows(spec, tokenizer, checkpoint, info, spec.label_column, "sequential")


def _refuse_decoders_keys(spec: GateSpec) -> None:
    if spec.tasks:
        raise RecipeError(
            "gate.tasks: lm-eval asks models that continue a text, and this one is an encoder: "
            "name gate.label_column to judge it by labels"
        )
    if spec.domain_column is not None:
        raise RecipeError(
            "gate.domain_column: windows of text are told apart by it, and an encoder is judged "
            "text by text: leave it out"
        )


def depends_on(job: EncoderJob) -> dict[str, Any]:
    """What tells this job from another that works in the same folder."""
    plan = job.plans[job.leading]
    return {
        "model": describe_model(job.checkpoint.source, job.model_files)["files"],
        "plan": {
            "precisions": [each.precision for each in job.plans],
            "tables": list(plan.tables),
            "layers": {
                linear.name: [linear.scheme.name, linear.method.name, linear.effort.name]
                for linear in layers_of(plan)
            },
        },
        "calibration": describe_texts(job.calibration),
        "versions": package_versions(),
    }


def layers_of(plan: EncoderPlan) -> list[LinearPlan]:
    """Return the linear layers of a plan, in the order of its groups."""
    return [linear for group in plan.groups for linear in group.linears]


def _uses_texts(exports: Sequence[ExportSpec], plans: Sequence[EncoderPlan]) -> bool:
    return any(
        looks_at_texts([each for each in layers_of(plan) if each.quantized], export.float_layers)
        for export, plan in zip(exports, plans, strict=True)
    )


def _check_rows(
    calibration: TextRows | None, evaluation: TextRows | None, plans: Sequence[EncoderPlan]
) -> list[str]:
    """Refuse an evaluation on calibration texts; return what was noticed in data that is fit."""
    notes = [note for rows in (calibration, evaluation) if rows is not None for note in rows.notes]
    if calibration is None:
        return notes
    calibrated = [each for plan in plans for each in layers_of(plan) if each.needs_statistics]
    widest = max((linear.in_features for linear in calibrated), default=0)
    tokens = sum(map(len, calibration.ids))
    if tokens < TOKENS_PER_INPUT * widest:
        notes.append(
            f"{tokens} calibration tokens are fewer than {TOKENS_PER_INPUT} for each of the "
            f"{widest} inputs of the widest layer: its statistics are noisy"
        )
    if evaluation is not None:
        notes += check_shared_texts(calibration, evaluation)
    return notes


def _load_rows(
    spec: CalibrationSpec | GateSpec,
    tokenizer: Any,
    checkpoint: Checkpoint,
    info: EncoderInfo,
    label_column: str | None,
    order: Order,
) -> TextRows:
    rows = load_rows(
        spec.data,
        split=spec.split,
        text_column=spec.text_column,
        pair_column=spec.text_pair_column,
        label_column=label_column,
        tokenizer=tokenizer,
        info=info,
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        order=order,
    )
    _check_vocabulary(rows, checkpoint)
    return rows


def _check_vocabulary(rows: TextRows, checkpoint: Checkpoint) -> None:
    size = checkpoint.config.get("vocab_size")
    largest = max(map(max, rows.ids))
    if isinstance(size, int) and largest >= size:
        raise CalibrationError(
            f"{rows.source}: the tokenizer gives the id {largest} and the model has {size} "
            f"embeddings: the tokenizer is not this model's"
        )
