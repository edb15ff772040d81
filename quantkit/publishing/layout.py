"""Which files go to a repository, under which names, and what those say that are made for it.

One artifact lies at the root, or in the folder of its variant, where runtimes look for it; several
keep the folders that they have in their output. quantkit.json and report/ lie beside. The card, the
evidence and the reports are written anew: they name the repository and no path of this machine.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.errors import PublishError
from quantkit.masking import hide_all
from quantkit.publishing.checking import CARD, EVIDENCE, CheckedArtifact, CheckedOutput
from quantkit.publishing.contents import Contents, Earlier, RemoteFile
from quantkit.publishing.scrubbing import find_local_paths, hide_local_paths
from quantkit.records import ArtifactReport, PublishedFile, Report
from quantkit.report import render_model_card
from quantkit.report.model_card import read_carried_front_matter
from quantkit.report.reading import read_report
from quantkit.report.usage import Place, serve_command
from quantkit.report.variants import Variant, render_variants, render_variants_card
from quantkit.report.write import render_reports

_HERE = "."
"""Path of an artifact that lies where its evidence does."""

# The Hub takes a file as a large one by the rules that a new repository has for names, by its
# size, and by whether its beginning is text (https://huggingface.co/docs/hub/storage-limits).
_LARGE_NAMES = frozenset(
    {".safetensors", ".gguf", ".onnx", ".bin", ".model", ".data", ".pt", ".npz", ".msgpack", ".zip"}
)
_LARGE_BYTES = 10 * 1024**2
_SAMPLE_BYTES = 512


def compose(
    output: CheckedOutput, place: Place, contents: Contents, token: str | None
) -> tuple[tuple[PublishedFile, ...], str]:
    """Return all files of a publication, in the order of their paths, and the command to run it.

    Args:
        output: what is published.
        place: the repository, and the folder of the variant.
        contents: what the repository has.
        token: must be in none of them.

    Raises:
        PublishError: a file has a name that is taken, or a report cannot be shown.
    """
    try:
        files, serve = _compose(output, place, contents, token)
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise PublishError(
            f"{output.folder} or {place.location} has a report that cannot be shown "
            f"({type(error).__name__}): was it edited?"
        ) from None
    except OSError as error:
        raise PublishError(f"cannot read {error.filename}: {error.strerror}") from None
    counts = Counter(file.path for file in files)
    path, count = counts.most_common(1)[0]
    if count > 1:
        raise PublishError(f"{output.folder}: its evidence names {path}, which publishing writes")
    return files, serve


def _compose(
    output: CheckedOutput, place: Place, contents: Contents, token: str | None
) -> tuple[tuple[PublishedFile, ...], str]:
    report, evidence = describe_published(output, token)
    begin = f"{place.folder}/" if place.folder else ""
    files = [
        _large_or_not(f"{begin}{_folder_of(row)}{file.path}", file.source, file.sha256)
        for artifact, row in zip(output.artifacts, report.artifacts, strict=True)
        for file in artifact.files
    ]
    texts = {f"{begin}report/{name}": text for name, text in render_reports(report).items()}
    texts[f"{begin}{EVIDENCE}"] = _render_json(evidence)
    ours = list_variants(report, place)
    carried = _carried(output.artifacts)
    for artifact, variant in zip(output.artifacts, ours, strict=True):
        texts[f"{begin}{_folder_of(variant.artifact)}{CARD}"] = render_model_card(
            report,
            variant.artifact,
            carried=read_carried_front_matter(artifact.folder / CARD),
            place=variant.place,
        )
    texts[CARD] = _render_root_card(ours, carried, place, contents.earlier)
    files += [_made(path, text.encode()) for path, text in texts.items()]
    settled = tuple(
        replace(file, present=is_same(file, contents.files.get(file.path)))
        for file in sorted(files, key=lambda file: file.path)
    )
    return settled, serve_command(ours[0].artifact, ours[0].place)


def describe_published(
    output: CheckedOutput, token: str | None
) -> tuple[Report, Mapping[str, Any]]:
    """Return report and evidence as they go out: without local paths, and true of the new places.

    Args:
        output: what is published.
        token: must be in neither.
    """
    paths = find_local_paths(output.document, output.folder)
    document = hide_all(hide_local_paths(dict(output.document), paths), token)
    if len(output.artifacts) == 1:
        for row in (*document["artifacts"], *document["evidence"]["artifacts"]):
            row["path"] = _HERE
    return read_report(document), document["evidence"]


def list_variants(report: Report, place: Place) -> list[Variant]:
    """Return the artifacts of a report with their places in the repository."""
    found = []
    for artifact in report.artifacts:
        inner = _folder_of(artifact).rstrip("/")
        folder = "/".join(part for part in (place.folder, inner) if part)
        where = replace(place, on_hub=True, folder=folder, evidence_above=bool(inner))
        found.append(Variant(report, artifact, where))
    return found


def _render_root_card(
    ours: Sequence[Variant],
    carried: Mapping[str, Any],
    place: Place,
    earlier: Sequence[Earlier],
) -> str:
    """The card of the whole repository: of what is at its root, with all variants listed."""
    own = (place.folder, ours, carried)
    kept = [
        (
            each.folder,
            list_variants(each.report, replace(place, folder=each.folder)),
            each.carried,
        )
        for each in earlier
        if each.folder != place.folder
    ]
    groups = sorted([own, *kept], key=lambda group: group[0])
    everything = [variant for _, variants, _ in groups for variant in variants]
    folder, first, carried = groups[0]
    if folder or len(first) > 1:
        return render_variants_card(everything, carried)
    return render_model_card(
        first[0].report,
        first[0].artifact,
        carried=carried,
        place=first[0].place,
        more=render_variants(everything) if len(everything) > 1 else "",
    )


def _folder_of(artifact: ArtifactReport) -> str:
    return "" if artifact.path == _HERE else f"{artifact.path}/"


def _carried(artifacts: Sequence[CheckedArtifact]) -> Mapping[str, Any]:
    """The terms that the job took over from the original's card, as any artifact has them."""
    return read_carried_front_matter(artifacts[0].folder / CARD)


def _render_json(evidence: Mapping[str, Any]) -> str:
    return json.dumps(evidence, indent=2, ensure_ascii=False) + "\n"


def _large_or_not(path: str, source: Path, sha256: str) -> PublishedFile:
    size = source.stat().st_size
    with source.open("rb") as handle:
        sample = handle.read(_SAMPLE_BYTES)
    ending = "." + path.rpartition(".")[2].lower()
    large = ending in _LARGE_NAMES or size > _LARGE_BYTES or b"\0" in sample
    return PublishedFile(path, size, sha256, large and size > 0, source=source)


def _made(path: str, content: bytes) -> PublishedFile:
    digest = hashlib.sha256(content).hexdigest()
    large = len(content) > _LARGE_BYTES
    return PublishedFile(path, len(content), digest, large, content=content)


def is_same(file: PublishedFile, there: RemoteFile | None) -> bool:
    """Whether a file of a revision is exactly this one."""
    if there is None or there.size_bytes != file.size_bytes:
        return False
    if there.sha256 is not None:
        return there.sha256 == file.sha256
    return there.blob == _name_blob(file)


def _name_blob(file: PublishedFile) -> str:
    """Return git's name of a small file's content."""
    content = file.content if file.source is None else file.source.read_bytes()
    content = content or b""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
