"""README.md of an artifact: the model card that travels with the weights."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from quantkit.durable import write_text
from quantkit.ggml_types import GGUF
from quantkit.recipe import AUTO
from quantkit.records import ArtifactReport, LayerRecord, Report, Verdict
from quantkit.report.evidence import recipe_changes, recipe_text
from quantkit.report.markdown_measured import task_table
from quantkit.report.probes import probe_rows, probe_sentence
from quantkit.report.rows import (
    check_rows,
    headline_cells,
    headline_rows,
    is_encoder,
    name_samples,
    speed_rows,
)
from quantkit.report.snippets import decoder_lines, encoder_lines
from quantkit.report.tables import table
from quantkit.report.text import clean_line, code_block, code_span, escape_markdown
from quantkit.schemes import ONNX, RUNTIME_NOTES, SCHEMES

CARRIED_KEYS = ("license", "license_name", "license_link", "language")
"""Front matter of the original that holds for a quantized copy too."""

_MOST_README_BYTES = 1 << 20
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
    carried = read_carried_front_matter(source_folder / "README.md")
    path = folder / "README.md"
    write_text(path, render_model_card(report, artifact, carried=carried))
    return path


def render_model_card(
    report: Report,
    artifact: ArtifactReport,
    *,
    carried: Mapping[str, Any] = MappingProxyType({}),
    location: str = ".",
) -> str:
    """Return the text of the card.

    The only timing in it is the speed of the artifact, where that was measured: but for it, the
    same job gives the same card.

    Args:
        report: the report that `artifact` is a row of.
        artifact: what the card is about.
        carried: front matter of the original's card; `CARRIED_KEYS` are taken over.
        location: Hub id or folder to put into the commands.
    """
    title = f"{_model_name(report)}, quantized to {_name_types(report, artifact)}"
    parts = [
        _front_matter(report, artifact, carried),
        f"# {escape_markdown(title)}",
        *_verdict(artifact),
        _measured(report, artifact),
        _tasks(artifact),
        _behaviour(artifact),
        _serving(report, artifact, location),
        _origin(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_carried_front_matter(readme: Path) -> dict[str, Any]:
    """Return those of `CARRIED_KEYS` that a model card's front matter has; none if unreadable.

    A card without a licence is no reason to stop a job, so nothing is raised.
    """
    try:
        with readme.open("rb") as file:
            text = file.read(_MOST_README_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return {}
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(match.group(1))):
            return {}
        found = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, ValueError, RecursionError):
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


def _front_matter(report: Report, artifact: ArtifactReport, carried: Mapping[str, Any]) -> str:
    keys: dict[str, Any] = {}
    base = _hub_id(report)
    if base is not None:
        keys["base_model"] = base
        keys["base_model_relation"] = "quantized"
    if artifact.format == ONNX:
        keys["library_name"] = "onnx" if is_encoder(artifact) else "onnxruntime-genai"
    elif artifact.format != GGUF:
        keys["library_name"] = "transformers"
    keys["pipeline_tag"] = _PIPELINE_TAGS[_find_task(artifact)]
    # A tag is one word to search for; the artifact's own scheme may be a list of several in words.
    schemes = [layer.scheme for layer in _own_layers(report, artifact) if layer.scheme != "none"]
    if artifact.format == GGUF and artifact.scheme != AUTO:
        schemes = [artifact.scheme]
    tags = ["quantkit", artifact.format, *(schemes or [artifact.scheme])]
    keys["tags"] = list(dict.fromkeys(clean_line(tag) for tag in tags if tag))
    keys |= _carried(carried)
    text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


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


def _hub_id(report: Report) -> str | None:
    """The Hub id of the original; None for a folder, which the front matter cannot name."""
    model = report.evidence.get("model")
    if isinstance(model, Mapping) and "revision" in model and model["revision"] is None:
        return None
    match = _HUB_ID.fullmatch(report.model)
    return report.model.partition("@")[0] if match else None


def _model_name(report: Report) -> str:
    """The Hub id, or a folder's last name: its path concerns nobody who reads the card."""
    return _hub_id(report) or re.split(r"[/\\]", report.model.rstrip("/\\"))[-1] or report.model


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
            f"Both models saw the same {judgement.windows} {name_samples(artifact)} in "
            f"{escape_markdown(artifact.runtime)}; intervals are at {confidence} confidence."
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


def _serving(report: Report, artifact: ArtifactReport, location: str) -> str:
    if artifact.format == GGUF:
        return _serving_file(artifact)
    if artifact.format == ONNX:
        return _serving_graph(artifact, location)
    quoted = json.dumps(location)
    where = "" if location != "." else " in this folder"
    notes = [f"- {escape_markdown(note)}." for note in _runtime_notes(report, artifact)]
    return "\n\n".join(
        [
            "## Use",
            f"With vLLM{where}:",
            code_block(f"vllm serve {shlex.quote(location)}", "sh"),
            f"With transformers{where} (`pip install transformers compressed-tensors`):",
            code_block(
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f"tokenizer = AutoTokenizer.from_pretrained({quoted})\n"
                f'model = AutoModelForCausalLM.from_pretrained({quoted}, dtype="auto")\n'
                'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
                "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
                "python",
            ),
            *(["\n".join(notes)] if notes else []),
        ]
    )


def _serving_file(artifact: ArtifactReport) -> str:
    """How to run a GGUF file that lies in the folder of the card."""
    model = shlex.quote(artifact.name.removesuffix(".gguf").lower())
    return "\n\n".join(
        [
            "## Use",
            "With llama.cpp in this folder:",
            code_block(f"llama-server -m {shlex.quote(artifact.name)}", "sh"),
            "With Ollama in this folder:",
            code_block(f"ollama create {model} -f Modelfile\nollama run {model}", "sh"),
        ]
    )


def _serving_graph(artifact: ArtifactReport, location: str) -> str:
    """How to run an ONNX artifact."""
    where = "" if location != "." else " in this folder"
    if is_encoder(artifact):
        needs, lines = "onnxruntime transformers", encoder_lines(location)
        name = "ONNX Runtime"
    else:
        needs, lines = "onnxruntime-genai", decoder_lines(location)
        name = "ONNX Runtime GenAI"
    return "\n\n".join(
        ["## Use", f"With {name}{where} (`pip install {needs}`):", code_block(lines, "python")]
    )


def _runtime_notes(report: Report, artifact: ArtifactReport) -> Sequence[str]:
    layers = _own_layers(report, artifact)
    used = {artifact.scheme, *(layer.scheme for layer in layers)} & set(SCHEMES)
    return [note for (scheme, _), note in RUNTIME_NOTES.items() if scheme in used]


def _origin(report: Report) -> str:
    parts = [
        "## Origin",
        f"Made with quantkit from {code_span(_model_name(report))}. `quantkit.json`, one folder up "
        "from these files, holds the evidence: hashes, versions, data and the error of each layer.",
    ]
    recipe = recipe_text(report.evidence)
    if recipe is not None:
        parts += ["The recipe:", code_block(recipe, "yaml")]
        changes = recipe_changes(report.evidence)
        if changes:
            parts += ["Changed on the command line:", code_block("\n".join(changes))]
    return "\n\n".join(parts)
