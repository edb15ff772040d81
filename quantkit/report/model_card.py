"""README.md of an artifact: the model card that travels with the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from quantkit.checkpoint.paths import join_inside
from quantkit.checkpoint.source import MODEL_CARD
from quantkit.durable import write_words
from quantkit.errors import CheckpointError, machine_trouble
from quantkit.ggml_types import GGUF
from quantkit.plain_yaml import MAX_YAML_BYTES, parse_yaml
from quantkit.recipe import AUTO
from quantkit.records import ArtifactReport, LayerRecord, Report, Verdict
from quantkit.report.custom import custom_part
from quantkit.report.evidence import recipe_changes, recipe_text
from quantkit.report.markdown_measured import task_table
from quantkit.report.probes import probe_rows, probe_sentence
from quantkit.report.rows import (
    check_rows,
    describe_samples,
    headline_cells,
    headline_rows,
    is_encoder,
    speed_rows,
)
from quantkit.report.tables import table
from quantkit.report.text import clean_line, code_block, code_span, escape_markdown
from quantkit.report.usage import Place, usage_section
from quantkit.schemes import MODELOPT, ONNX

CARRIED_KEYS = ("license", "license_name", "license_link", "language")
"""Front matter of the original that holds for a quantized copy too."""

_MOST_README_BYTES = MAX_YAML_BYTES
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(@[\w.-]+)?")

_VERDICT_WORDS: Mapping[Verdict, str] = MappingProxyType(
    {
        "PASS": "This artifact was measured against {baseline} and is within every limit.",
        "FAIL": "Do not use this artifact: it is not close enough to {baseline}.",
        "INCONCLUSIVE": "Not proven: the measurement does not decide whether this artifact is "
        "close enough to {baseline}.",
        "UNJUDGED": "Not proven: nobody has measured this artifact against {baseline}.",
    }
)

_PIPELINE_TAGS: Mapping[str | None, str] = MappingProxyType(
    {
        None: "text-generation",
        "embedding": "feature-extraction",
        "sequence-classification": "text-classification",
        "token-classification": "token-classification",
    }
)
"""Task of an encoder, None for decoders -> the Hub's name of it."""


def write_model_card(
    report: Report, artifact: ArtifactReport, folder: Path, source_folder: Path
) -> Path:
    """Write the card of `artifact` as README.md into `folder`, with the original's licence.

    Raises:
        ResourceError, OutputError: the file cannot be written.
    """
    try:
        carried = read_carried_front_matter(join_inside(source_folder, MODEL_CARD))
    except CheckpointError:
        # It was another when the checkpoint was opened, which refuses it.
        carried = {}
    path = folder / "README.md"
    write_words(path, render_model_card(report, artifact, carried=carried))
    return path


def render_model_card(
    report: Report,
    artifact: ArtifactReport,
    *,
    carried: Mapping[str, Any] = MappingProxyType({}),
    location: str = ".",
    place: Place | None = None,
    more: str = "",
) -> str:
    """Return the text of the card.

    The only timing in it is the speed of the artifact, where that was measured: but for it, the
    same job gives the same card.

    Args:
        report: the report that `artifact` is a row of.
        artifact: what the card is about.
        carried: front matter of the original's card; `CARRIED_KEYS` are taken over.
        location: Hub id or folder to put into the commands.
        place: where on the Hub it lies; instead of `location`.
        more: sections to end with.
    """
    title = f"{model_name(report)}, quantized to {_name_types(report, artifact)}"
    parts = [
        front_matter([(report, artifact)], carried),
        f"# {escape_markdown(title)}",
        *_verdict(artifact),
        _measured(report, artifact),
        _tasks(artifact),
        _behaviour(artifact),
        custom_part(replace(report, artifacts=(artifact,))).replace("###", "##", 1),
        usage_section(artifact, place or Place(location), _own_layers(report, artifact)),
        _origin(report, place),
        more,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_carried_front_matter(readme: Path) -> dict[str, Any]:
    """Return those of `CARRIED_KEYS` that a model card's front matter has; none if unreadable.

    A card without a licence is no reason to stop a job.

    Raises:
        ResourceError: a disk has failed, or too many files are open: the card may have one.
    """
    if not readme.is_file():
        # A pipe would keep its reader waiting.
        return {}
    try:
        with readme.open("rb") as file:
            text = file.read(_MOST_README_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        trouble = machine_trouble(error)
        if trouble is not None:
            raise trouble from error
        return {}
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}
    try:
        found, _ = parse_yaml(match.group(1))
    except yaml.YAMLError:
        return {}
    return _carried(found) if isinstance(found, dict) else {}


def _carried(found: Mapping[str, Any]) -> dict[str, Any]:
    """The carried keys whose values are a line of text or a list of such."""
    kept: dict[str, Any] = {}
    for key in CARRIED_KEYS:
        value = found.get(key)
        if isinstance(value, str):
            kept[key] = clean_line(value)
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            kept[key] = [clean_line(item) for item in value]
    return kept


def front_matter(rows: Sequence[tuple[Report, ArtifactReport]], carried: Mapping[str, Any]) -> str:
    """Return what the Hub reads of a card: it links to the original and can be searched for.

    Args:
        rows: what the card is about, each in its report; the tags of all come together, the first
            decides the rest.
        carried: as for `render_model_card`.
    """
    report, artifact = rows[0]
    keys: dict[str, Any] = {}
    base = hub_id(report)
    if base is not None:
        keys["base_model"] = base
        keys["base_model_relation"] = "quantized"
    if artifact.format == ONNX:
        keys["library_name"] = "onnx" if is_encoder(artifact) else "onnxruntime-genai"
    elif artifact.format == MODELOPT:
        # As on NVIDIA's own cards.
        keys["library_name"] = "Model Optimizer"
    elif artifact.format != GGUF:
        keys["library_name"] = "transformers"
    keys["pipeline_tag"] = _PIPELINE_TAGS[_find_task(artifact)]
    tags = ["quantkit", *(tag for row in rows for tag in _tags(*row))]
    keys["tags"] = list(dict.fromkeys(clean_line(tag) for tag in tags if tag))
    keys |= _carried(carried)
    text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def _tags(report: Report, artifact: ArtifactReport) -> list[str]:
    # A tag is one word to search for; the artifact's own scheme may be a list of several in words.
    schemes = [layer.scheme for layer in _own_layers(report, artifact) if layer.scheme != "none"]
    if artifact.format == GGUF and artifact.scheme != AUTO:
        schemes = [artifact.scheme]
    return [artifact.format, *(schemes or [artifact.scheme])]


def _find_task(artifact: ArtifactReport) -> str | None:
    """An encoder's task, which an artifact of unknown origin shows by what it was judged by."""
    if artifact.task is not None or not is_encoder(artifact):
        return artifact.task
    names = {measure.name for measure in artifact.judgement.measures}
    return "embedding" if "cosine" in names else "sequence-classification"


def _name_types(report: Report, artifact: ArtifactReport) -> str:
    """Return the artifact's scheme, or the types of a file in which each layer has its own."""
    if artifact.scheme != AUTO:
        return artifact.scheme
    return f"a mix of {', '.join(sorted({each.scheme for each in _own_layers(report, artifact)}))}"


def _own_layers(report: Report, artifact: ArtifactReport) -> list[LayerRecord]:
    """The layers of this artifact; a job may have solved others for other formats."""
    wanted = artifact.scheme if artifact.format == GGUF else None
    return [layer for layer in report.layers if layer.file_type == wanted]


def hub_id(report: Report) -> str | None:
    """The Hub id of the original; None for a folder, which the front matter cannot name."""
    model = report.evidence.get("model")
    if isinstance(model, Mapping) and "revision" in model and model["revision"] is None:
        return None
    match = _HUB_ID.fullmatch(report.model)
    return report.model.partition("@")[0] if match else None


def model_name(report: Report) -> str:
    """The Hub id, or a folder's last name: its path concerns nobody who reads the card."""
    return hub_id(report) or re.split(r"[/\\]", report.model.rstrip("/\\"))[-1] or report.model


def _verdict(artifact: ArtifactReport) -> list[str]:
    judgement = artifact.judgement
    baseline = "the original" if is_encoder(artifact) else "its 16-bit baseline"
    words = _VERDICT_WORDS[judgement.verdict].format(baseline=baseline)
    parts = [f"> **{judgement.verdict}**: {words}"]
    if judgement.reasons and judgement.verdict != "PASS":
        parts.append("\n".join(f"- {escape_markdown(reason)}" for reason in judgement.reasons))
    return parts


def _measured(report: Report, artifact: ArtifactReport) -> str:
    (found,) = headline_cells(headline_rows(replace(report, artifacts=(artifact,))))
    cells = {key: text for key, text in found.items() if key != "Artifact"}
    lines = [[escape_markdown(key), escape_markdown(text)] for key, text in cells.items()]
    parts = ["## Measured", table(["", ""], lines)]
    judgement = artifact.judgement
    if judgement.checks:
        confidence = f"{100 * judgement.confidence:.4g}%"
        checks = [
            [
                *(escape_markdown(t) for t in (row.label, row.limit, row.value, row.interval)),
                row.verdict,
            ]
            for row in check_rows(judgement)
        ]
        parts.append(
            f"Both models saw the same {escape_markdown(describe_samples(artifact))}; "
            f"intervals are at {confidence} confidence."
        )
        parts.append(table(["Check", "Limit", "Value", "Interval", "Verdict"], checks))
    parts += [
        escape_markdown(f"Speed in {row.where}: {row.what}, {row.figure} ({row.ratio}).")
        for row in speed_rows(replace(report, artifacts=(artifact,)))
    ]
    return "\n\n".join(parts)


def _tasks(artifact: ArtifactReport) -> str:
    found = task_table(artifact)
    return f"## Tasks\n\nBoth models answered the same documents.\n\n{found}" if found else ""


def _behaviour(artifact: ArtifactReport) -> str:
    """One line a probe; what was not looked at is said too."""
    lines = []
    for row in probe_rows(artifact):
        verdict = f" {row.verdict}." if row.is_judged else ""
        lines.append(f"- {escape_markdown(probe_sentence(row).rstrip('.') + '.' + verdict)}")
    return "\n\n".join(["## Behaviour", "\n".join(lines)]) if lines else ""


def _origin(report: Report, place: Place | None) -> str:
    where = "one folder up from" if place is None or place.evidence_above else "beside"
    parts = [
        "## Origin",
        f"Made with quantkit from {code_span(model_name(report))}. `quantkit.json`, {where} "
        "these files, holds the evidence: hashes, versions, data and the error of each layer.",
    ]
    solvers = report.evidence.get("solvers")
    if isinstance(solvers, Mapping) and solvers:
        names = ", ".join(
            f"{code_span(name)} ({code_span(str(found['name']))}, sha256 of its source "
            f"{code_span(str(found['sha256']))})"
            for name, found in solvers.items()
        )
        parts.append(f"Codes were chosen by solvers that are no part of quantkit: {names}.")
    recipe = recipe_text(report.evidence)
    if recipe is not None:
        parts += ["The recipe:", code_block(recipe, "yaml")]
        changes = recipe_changes(report.evidence)
        if changes:
            parts += ["Changed on the command line:", code_block("\n".join(changes))]
    return "\n\n".join(parts)
