"""Does the gate see broken artifacts? Sound ones are made, broken in many ways, and judged.

Each sound artifact comes from a quick job on the bundled demo model (the encoder: on a tiny one of
random weights). Each kind of damage is done to a copy without quantkit.json, so that no recorded
hash gives it away: a tool that writes wrong files would record the hashes of these. `quantkit.gate`
with its default limits on 32 windows of 256 tokens then looks at it. Caught is what it fails or
refuses as an error; INCONCLUSIVE is not enough. `quantkit.verify` against the baseline, which the
gate also does, looks at it once more: its problems tell which of the gate's reasons come from the
files, and which from what the runtime computes. Sound artifacts have to pass both. Outcomes stay in
the folder of the work, and what has one is not judged again.

usage: python benchmarks/broken_artifacts.py [--work artifacts/broken] [--only WORD ...]
           [--processes 1]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from damage import DAMAGE, Damage
from measure import (
    ROOT,
    describe_commit,
    describe_machine,
    package_versions,
    write_results,
)

import quantkit

DEMO = ROOT / "models" / "demo-llama"
EVALUATION = ROOT / "calib_data" / "docs_evaluation.txt"
WINDOWS = ("gate.samples=32", "gate.sequence_length=256")
TEXTS = ("gate.samples=200", "gate.sequence_length=128")
QUICK = (
    "quantize.effort=fast",
    "calibration.samples=16",
    "calibration.sequence_length=256",
)
EXPORTS = "export=[{format: compressed-tensors}, {format: gguf, type: Q4_K_M}, {format: onnx}]"
ENCODER = "onnx_encoder"
PACKAGES = ("quantkit", "torch", "transformers", "compressed-tensors", "onnx", "onnxruntime")
LONGEST = 130
"""Letters of what a tool said, in the table."""


@dataclass(frozen=True)
class Sound:
    """A sound artifact: which job makes it, and where it lies in the job's output."""

    recipe: str
    folder: str
    settings: tuple[str, ...] = ()


SOUND = {
    "w4a16": Sound("onnx-int4", "compressed-tensors", (EXPORTS,)),
    "gguf": Sound("onnx-int4", "gguf", (EXPORTS,)),
    "onnx_int4": Sound("onnx-int4", "onnx", (EXPORTS,)),
    "w4a16_asym": Sound("w4a16-asym", "compressed-tensors"),
    "w8a8": Sound("int8", "compressed-tensors"),
    "fp8_kv": Sound("fp8-kv", "compressed-tensors"),
    ENCODER: Sound("onnx-int8-encoder", "onnx", ("quantize.scheme=w8a8_static",)),
}
"""Name -> how it is made. Those of one recipe come from one job."""


@dataclass(frozen=True)
class Outcome:
    """What the tools said of one artifact."""

    artifact: str
    name: str
    """Of the damage; empty for the sound one."""
    words: str
    gate: str
    """The verdict, or ERROR."""
    gate_words: str
    verify: str
    """SOUND, PROBLEM or ERROR."""
    verify_words: str
    computed: bool
    """Whether the gate has a reason that is none of verify's: what its runtime computed, read or
    refused."""

    @property
    def caught(self) -> bool:
        """Whether the artifact is stopped."""
        return self.gate in ("FAIL", "ERROR")

    @property
    def in_files(self) -> bool:
        """Whether the files alone tell."""
        return self.verify != "SOUND"


def main() -> None:
    """Make, break, judge, report.

    Raises:
        SystemExit: something broken passed, or something sound did not.
    """
    arguments = _parse_arguments()
    sound = make_sound(arguments.work)
    kinds = [each for each in DAMAGE if all(word in label(each) for word in arguments.only)]
    tasks: list[tuple[str, Damage | None]] = [(name, None) for name in SOUND if not arguments.only]
    tasks += [(each.artifact, each) for each in kinds]
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        waiting = [
            pool.submit(judge, sound[name], name, _position(damage), arguments.work / "tries")
            for name, damage in tasks
        ]
        outcomes = []
        for future in waiting:
            outcomes.append(future.result())
            print(describe(outcomes[-1]), file=sys.stderr, flush=True)
    wrong = [each for each in outcomes if each.caught != bool(each.name) or _is_doubtful(each)]
    if arguments.only:
        print(tabulate(outcomes))
    else:
        write_results("broken_artifacts", _document(outcomes), tabulate(outcomes))
    if wrong:
        raise SystemExit("\n".join(["judged wrongly:", *map(describe, wrong)]))


def make_sound(work: Path) -> dict[str, Path]:
    """Return name -> folder of the sound artifacts; those that are there are not made again."""
    found = {}
    for name, each in SOUND.items():
        output = work / "sound" / each.recipe
        if not output.exists():
            baseline = find_baseline(name, work)
            if name == ENCODER and not baseline.exists():
                write_encoder(baseline)
            quantkit.quantize(
                each.recipe,
                model=str(baseline),
                output=output,
                overrides=[*QUICK, *each.settings] if name != ENCODER else each.settings,
                device="cpu",
                gate=False,
            )
        found[name] = output / each.folder
    return found


def find_baseline(name: str, work: Path) -> Path:
    """Return the folder of the checkpoint that an artifact is made from."""
    return work / "encoder" if name == ENCODER else DEMO


def write_encoder(folder: Path) -> None:
    """Write the tiny encoder of the tests, 64 wide."""
    sys.path.insert(0, str(ROOT))
    from tests.encoder_models import write_encoder_checkpoint

    write_encoder_checkpoint(folder, hidden=64)


def judge(sound: Path, artifact: str, position: int | None, scratch: Path) -> Outcome:
    """Break a copy of an artifact and let both tools look at it.

    Args:
        position: of the damage in `DAMAGE`; None: none is done.
        scratch: the copy lies there meanwhile, and the outcome afterwards; one that is there
            already is returned as it is.
    """
    damage = None if position is None else DAMAGE[position]
    baseline = find_baseline(artifact, scratch.parent)
    name, words = ("", "") if damage is None else (damage.name, damage.words)
    place = scratch / f"{artifact}-{(name or 'sound').replace(' ', '-')}"
    known = place.with_suffix(".json")
    if known.exists():
        return Outcome(**json.loads(known.read_text(encoding="utf-8")))
    shutil.rmtree(place, ignore_errors=True)
    copy = place / "artifact"
    shutil.copytree(sound, copy)
    if damage is not None:
        damage.apply(copy, baseline)
    settings = TEXTS if artifact == ENCODER else WINDOWS
    verdict, reasons = run_gate(copy, baseline, place / "gate", settings)
    checked, problems = run_verify(copy, baseline)
    shutil.rmtree(place)
    own = [reason for reason in reasons if reason not in problems]
    outcome = Outcome(
        artifact=artifact,
        name=name,
        words=words,
        gate=verdict,
        gate_words=_shorten("; ".join(own or reasons)),
        verify=checked,
        verify_words=_shorten("; ".join(problems)),
        computed=verdict == "ERROR" or (verdict == "FAIL" and bool(own)),
    )
    known.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    return outcome


def run_gate(
    artifact: Path, baseline: Path, output: Path, settings: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """Return the verdict, or ERROR, and why."""
    try:
        report = quantkit.gate(
            artifact,
            baseline=baseline,
            data=EVALUATION,
            output=output,
            overrides=settings,
            device="cpu",
        )
    except quantkit.QuantkitError as error:
        return "ERROR", (str(error).replace(f"{artifact}/", ""),)
    (row,) = report.artifacts
    return report.verdict, row.judgement.reasons


def run_verify(artifact: Path, baseline: Path) -> tuple[str, tuple[str, ...]]:
    """Return SOUND, PROBLEM or ERROR, and why."""
    try:
        found = quantkit.verify(artifact, against=baseline)
    except quantkit.QuantkitError as error:
        return "ERROR", (str(error).replace(f"{artifact}/", ""),)
    return ("PROBLEM" if found.problems else "SOUND"), found.problems


def tabulate(outcomes: Sequence[Outcome]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| artifact | damage | what was done | gate | by its runtime | by its files | words |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        by_runtime, by_files = ("yes" if seen else "no" for seen in (each.computed, each.in_files))
        cells = (
            each.artifact,
            each.name or "none",
            each.words,
            each.gate,
            by_runtime,
            by_files,
            each.gate_words or each.verify_words,
        )
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def describe(outcome: Outcome) -> str:
    """Return one line on an outcome."""
    return (
        f"{outcome.artifact}, {outcome.name or 'sound'}: gate {outcome.gate} "
        f"({outcome.gate_words}), verify {outcome.verify} ({outcome.verify_words})"
    )


def label(damage: Damage) -> str:
    """Return what `--only` looks at."""
    return f"{damage.artifact} {damage.name}"


def _is_doubtful(outcome: Outcome) -> bool:
    """Whether something sound did not pass the gate."""
    return not outcome.name and outcome.gate != "PASS"


def _position(damage: Damage | None) -> int | None:
    return None if damage is None else DAMAGE.index(damage)


def _shorten(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST].rstrip()} ..."


def _document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "commit": describe_commit(),
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "outcomes": [asdict(each) | {"caught": each.caught} for each in outcomes],
    }


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "broken")
    parser.add_argument("--only", nargs="*", default=[], help="words that artifact and name hold")
    parser.add_argument("--processes", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
