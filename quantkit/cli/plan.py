"""`quantkit plan`: what a job would do, before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import quantkit
from quantkit.capacity import read_memory
from quantkit.cli.console import Reply
from quantkit.cli.encoder_plan import encoder_document, encoder_rows
from quantkit.cli.layout import make_table
from quantkit.cli.options import (
    DeviceOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    ModelOption,
    OutputOption,
    OverridesOption,
    OverwriteOption,
    QuietOption,
    RecipeOption,
    given,
    one_model,
)
from quantkit.cli.predicted import prediction_document, prediction_rows
from quantkit.cli.process import load_for_good
from quantkit.durable import write_words
from quantkit.errors import OutputError, QuantkitError
from quantkit.inputs import LoadedRecipe, check_inputs, load
from quantkit.records import EncoderPlan, GgufPlan, LinearPlan, OpenChoice, Plan
from quantkit.report.plan_markdown import name_plan, render_plan, render_refusal, size_rows
from quantkit.report.rounding import format_bytes, format_ratio

EXAMPLE = "Example: quantkit plan MODEL --recipe awq4"


def plan(
    recipe: RecipeOption,
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    output: OutputOption = None,
    overrides: OverridesOption = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    overwrite: OverwriteOption = None,
    markdown: Annotated[
        str | None,
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="Also write the plan, or the problems, as Markdown for a pull request.",
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Show what a job would do and take: layers, size, time, memory, disk, and the problems.

    Reads the config and the headers, and measures this machine for a second.
    """
    model = one_model(model_argument, model)
    page = None if markdown is None else _page(markdown)
    mark = name_plan([recipe, model or "", *(overrides or ())])
    try:
        # What the files alone can refuse is answered before torch is loaded, which takes seconds.
        most = read_memory(memory)
        loaded = load(recipe, model, output, overrides or ())
        check_inputs(loaded, overwrite=bool(overwrite), output_needed=False)
        options = given(
            model=model,
            output=output,
            overrides=overrides,
            device=device,
            memory=most,
            overwrite=overwrite,
        )
        found = load_for_good(lambda: quantkit.plan)(recipe, **options)
    except QuantkitError as error:
        if page is not None:
            write_words(page, render_refusal(error, mark=mark, recipe=recipe, model=model))
        raise
    if page is not None:
        write_words(page, _markdown(mark, recipe, loaded, found))
    if isinstance(found, EncoderPlan):
        return _reply(encoder_document(found), encoder_rows(found), found.notes)
    return _reply(_document(found), _rows(found), _notes(found))


def _page(markdown: str) -> Path:
    """The file for the Markdown, looked at before any work.

    Raises:
        OutputError: it is a folder, or its own folder is not there.
    """
    page = Path(markdown)
    if page.is_dir():
        raise OutputError(f"--markdown {markdown} is a folder: name a file")
    if not page.absolute().parent.is_dir():
        raise OutputError(f"--markdown {markdown}: there is no folder {page.absolute().parent}")
    return page


def _markdown(mark: str, recipe: str, loaded: LoadedRecipe, plan: Plan | EncoderPlan) -> str:
    rows = encoder_rows(plan) if isinstance(plan, EncoderPlan) else _rows(plan)
    # The sizes have a table of their own there.
    told = ("size", "bits per weight")
    facts = [row for row in rows if row[0] not in told]
    notes = plan.notes if isinstance(plan, EncoderPlan) else _notes(plan)
    sizes = size_rows(plan, loaded.recipe.export)
    return render_plan(plan, mark=mark, recipe=recipe, sizes=sizes, facts=facts, notes=notes)


def _reply(
    document: dict[str, Any], rows: Iterable[tuple[str, str]], notes: Iterable[str]
) -> Reply:
    table = make_table([*rows, *(("note", note) for note in notes)])
    return Reply(document, [table, "No problem found."])


def _document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: schemes and methods by name, `auto` where they are still to be chosen.

    The types of a GGUF file are counted as far as they are not.
    """
    undecided = set() if plan.choice is None else _open_names(plan.choice)
    return {
        "model": plan.model,
        "family": plan.family,
        "blocks": len(plan.blocks),
        "parameters": plan.parameters,
        "baseline_bytes": plan.baseline_bytes,
        "artifact_bytes": plan.artifact_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "block_bytes": plan.block_bytes,
        "activation_bytes": plan.activation_bytes,
        "statistics_bytes": plan.statistics_bytes,
        "disk_bytes": plan.disk_bytes,
        "prediction": prediction_document(plan.prediction),
        "notes": list(plan.notes),
        "choice": None if plan.choice is None else _choice_document(plan.choice),
        "gguf": [
            {
                "type": file.type,
                "tensor_bytes": file.tensor_bytes,
                "bits_per_weight": 8 * file.tensor_bytes / plan.parameters,
                "types": dict(_count_types(file)),
            }
            for file in plan.gguf
        ],
        "linears": [_linear(linear, linear.name in undecided) for linear in plan.linears],
    }


def _linear(linear: LinearPlan, undecided: bool) -> dict[str, Any]:
    known = linear.quantized and not undecided
    return {
        "name": linear.name,
        "shape": [linear.out_features, linear.in_features],
        "scheme": "auto" if undecided else linear.scheme.name,
        "group_size": linear.group_size if known else None,
        "method": linear.method.name if known else None,
    }


def _choice_document(choice: OpenChoice) -> dict[str, Any]:
    """What is still to be chosen: the layers of each unit, and each candidate's bytes."""
    return {
        "target_bits": choice.target_bits,
        "max_kl": choice.max_kl,
        "lowest_bits": choice.lowest_bits,
        "highest_bits": choice.highest_bits,
        "windows": choice.windows,
        "window_tokens": choice.window_tokens,
        "passes": len(choice.passes),
        "memory_bytes": choice.memory_bytes,
        "units": [
            {
                "layers": [linear.name for linear in unit.candidates[0].linears],
                "candidates": {each.scheme: each.size_bytes for each in unit.candidates},
            }
            for unit in choice.units
        ],
    }


def _rows(plan: Plan) -> list[tuple[str, str]]:
    linears = plan.linears
    undecided = set() if plan.choice is None else _open_names(plan.choice)
    settled = [] if plan.gguf_leads else [each for each in linears if each.name not in undecided]
    treatments = Counter(_treatment(linear) for linear in settled)
    size, original = format_bytes(plan.artifact_bytes), format_bytes(plan.baseline_bytes)
    ratio = format_ratio(plan.artifact_bytes, plan.baseline_bytes)
    most = "" if plan.choice is None else "at most "
    return [
        ("model", f"{plan.model} ({plan.parameters:,} weights, family {plan.family})"),
        (
            "blocks",
            f"{len(plan.blocks)} of {len(linears) // max(1, len(plan.blocks))} linear layers",
        ),
        *(("layers", f"{count} x {treatment}") for treatment, count in treatments.items()),
        *(() if plan.choice is None else _choice_rows(plan.choice, len(undecided))),
        ("size", f"{most}{size} of {original}, {ratio}"),
        ("bits per weight", f"{most}{plan.bits_per_weight:.2f}"),
        *((f"gguf {file.type}", _describe_file(file, plan)) for file in plan.gguf),
        *(_memory_rows(plan) if plan.prediction is None else prediction_rows(plan.prediction)),
        ("disk", f"at most {format_bytes(_disk(plan))} at the output"),
    ]


def _notes(plan: Plan) -> tuple[str, ...]:
    return (*plan.notes, *(plan.prediction.notes if plan.prediction else ()))


def _describe_file(file: GgufPlan, plan: Plan) -> str:
    """Size of a GGUF file's tensors, and how many of them have which type."""
    types = ", ".join(f"{count} x {name}" for name, count in _count_types(file).most_common())
    if file.candidates:
        types += f", {len(file.candidates)} to be chosen"
    bits = 8 * file.tensor_bytes / plan.parameters
    most = "at most " if file.candidates else ""
    return f"{most}{format_bytes(file.tensor_bytes)}, {bits:.2f} bits per weight: {types}"


def _count_types(file: GgufPlan) -> Counter[str]:
    """How many tensors have which type, those that are still to be chosen left out."""
    return Counter(file.types.values()) - Counter(file.weights[name] for name in file.candidates)


def _open_names(choice: OpenChoice) -> set[str]:
    return {linear.name for unit in choice.units for linear in unit.candidates[0].linears}


def _choice_rows(choice: OpenChoice, layers: int) -> Iterator[tuple[str, str]]:
    """What `auto` leaves open, and within which bounds."""
    schemes = dict.fromkeys(
        candidate.scheme for unit in choice.units for candidate in unit.candidates
    )
    yield (
        "layers",
        f"{layers} x one of {', '.join(schemes)}, chosen on calibration data when the job runs",
    )
    target = (
        f"the least divergence within {choice.target_bits:g} bits per weight"
        if choice.target_bits is not None
        else f"the fewest bits with a predicted KL of at most {choice.max_kl:g}"
    )
    yield (
        "choice",
        f"{target}; {len(choice.units)} units of layers, {choice.lowest_bits:.2f} to "
        f"{choice.highest_bits:.2f} bits per weight",
    )
    passes = len(choice.passes)
    yield (
        "measured on",
        f"{choice.windows} windows of {choice.window_tokens} tokens, in {passes} "
        f"pass{'es' if passes != 1 else ''} over the weights, with "
        f"{format_bytes(choice.memory_bytes)} of hidden states and statistics",
    )


def _disk(plan: Plan) -> int:
    return plan.disk_bytes if plan.prediction is None else plan.prediction.disk_bytes


def _memory_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """What is held at the most: while solving, or while measuring for a choice."""
    measuring = 0 if plan.choice is None else plan.choice.memory_bytes
    held = plan.block_bytes + max(plan.activation_bytes + plan.statistics_bytes, measuring)
    yield (
        "memory",
        f"{format_bytes(held)} besides the libraries: one block, its inputs, statistics",
    )


def _treatment(linear: LinearPlan) -> str:
    if not linear.quantized:
        return "left in 16 bits"
    group = "one scale a row" if linear.group_size is None else f"group size {linear.group_size}"
    group = "one scale a tensor" if linear.one_scale else group
    return f"{linear.scheme.name}, {group}, {linear.method.name}"
