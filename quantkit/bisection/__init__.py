"""Which layers make an artifact fail its gate, and what would make it pass (docs/bisect.md)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from quantkit.bisection.answers import Answer, ConfigFinding, find_answer
from quantkit.bisection.bench import Part, measure, place_buffers, prepare, set_up
from quantkit.bisection.reading import open_base, open_weights
from quantkit.bisection.records import Bisection
from quantkit.bisection.search import Setting
from quantkit.bisection.survey import Pair, find_flaws, pair_up, survey
from quantkit.bisection.words import write_results
from quantkit.calibration.compute import choose_device
from quantkit.calibration.data import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.skeleton import build_skeleton, build_unchecked, summarize_names
from quantkit.checkpoint.source import resolve_source
from quantkit.checkpoint.structure import find_groups
from quantkit.encoders.architectures import is_encoder
from quantkit.errors import CheckpointError, InputError
from quantkit.evidence import read_evidence
from quantkit.formats.configs import compare_configs
from quantkit.formats.inspect import inspect_artifact
from quantkit.formats.inspected import Inspection
from quantkit.gating import find_gate_spec, recorded_gate
from quantkit.ggml_types import GGUF
from quantkit.inputs import RecipeLike
from quantkit.job_windows import load_evaluation
from quantkit.judging.sampling import plan_looks, shuffle_windows
from quantkit.judging.scoring import select_scored
from quantkit.numerics.onednn import quick_float32
from quantkit.planning.sizes import choose_scale_dtype
from quantkit.recipe import GateSpec, Overrides
from quantkit.records import Progress, TokenWindows
from quantkit.running import memory_errors, silent, staged
from quantkit.staging import commit

WINDOWS = 16
"""Windows on which trials are measured."""
_RECORDED = ("the limits are those that the artifact's own quantkit.json names",)
_DERIVED = ".rotary_emb.inv_freq"
"""A buffer that old checkpoints store."""
_WINDOW_TOKENS = 256
"""Tokens of one of them, at the most."""


@quick_float32()
def bisect(
    artifact: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str],
    recipe: RecipeLike | None = None,
    data: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Overrides = (),
    windows: int = WINDOWS,
    device: str = "auto",
    progress: Progress | None = None,
) -> Bisection:
    """Find the layers that make an artifact fail its gate, and what would make it pass.

    The original's weights are put back block by block and layer by layer, and the divergence from
    the baseline is measured each time, in float32, in this process.

    Args:
        artifact: a compressed-tensors, GPTQ, AWQ or FP8 folder, an output of `quantize`, or a GGUF
            file.
        baseline: folder, Hub id or id@revision of the original.
        recipe: where the limits and the data come from; by default the recipe in the artifact's
            own evidence, else the default limits.
        data: evaluation text; replaces the recipe's.
        output: folder for bisect.json and bisect.md; None: nothing is written.
        overrides: `gate.KEY=VALUE` pairs.
        windows: of at most 256 tokens, on which trials are compared. What is proposed has been
            judged on all of `gate.samples`.
        device: `auto`, `cpu` or `cuda`.
        progress: called after each step.

    Raises:
        InputError: something that was given cannot be used, or the format is not decoded.
    """
    started, tell = time.monotonic(), progress or silent
    if windows < 1:
        raise InputError(f"--windows {windows}: at least one window is needed")
    with ExitStack() as stack:
        folder = None
        if output is not None:
            folder = stack.enter_context(staged(Path(output), overwrite=False, tell=tell))
        found = inspect_artifact(Path(artifact))
        evidence = read_evidence(found.folder)
        spec = find_gate_spec(recipe, evidence, data, overrides)
        base = open_checkpoint(resolve_source(os.fspath(baseline)))
        if is_encoder(base.config):
            raise InputError(f"{baseline} is an encoder: what is bisected are decoders")
        evaluation = load_evaluation(spec, load_tokenizer(base.source.folder), base)
        evaluation = select_scored(shuffle_windows(evaluation, spec.seed))
        recorded = recipe is None and bool(recorded_gate(evidence))
        with memory_errors():
            setting, pair = _set_up(found, base, evaluation, spec, windows, device, tell)
            answer = find_answer(setting, _measure_config(setting, pair), found, base)
        result = _describe(
            answer,
            found,
            base,
            setting,
            artifact=os.fspath(artifact),
            notes=(*evaluation.notes, *_find_notes(pair), *(_RECORDED if recorded else ())),
            seconds=time.monotonic() - started,
        )
        if output is not None and folder is not None:
            write_results(result, folder)
            commit(folder, Path(output), overwrite=False)
    return result


def _set_up(
    found: Inspection,
    base: Checkpoint,
    evaluation: TokenWindows,
    spec: GateSpec,
    windows: int,
    device: str,
    tell: Progress,
) -> tuple[Setting, Pair]:
    """Read all weights once, and run the original on the first windows."""
    weights = open_weights(found, base)
    skeleton = build_skeleton(base)
    structure = find_groups(base, skeleton)
    pair = pair_up(skeleton, structure, weights, open_base(base))
    units = list(survey(pair, tell))
    shapes = {unit.name: tuple(skeleton.get_parameter(unit.tensors[0]).shape) for unit in units}
    looks = plan_looks(spec.samples, len(evaluation.ids))
    kept: list[Part] = []

    def find_whole() -> Part:
        if not kept:
            kept.append(prepare(bench, _cut(evaluation, looks[0], None)))
        return kept[0]

    bench = set_up(skeleton, pair, find_flaws(units), choose_device(device), tell)
    setting = Setting(
        bench=bench,
        quick=prepare(bench, _cut(evaluation, min(windows, looks[0]), _WINDOW_TOKENS)),
        find_whole=find_whole,
        looks=looks,
        spec=spec,
        written=found.format,
        scale_dtype=choose_scale_dtype(base, ()),
        # In a GGUF file each tensor has a type of its own.
        fused=()
        if found.format == GGUF
        else tuple(names for block in structure.blocks for names in block.fused),
        shapes=shapes,
    )
    return setting, pair


def _find_notes(pair: Pair) -> Iterator[str]:
    """Yield what was left out of the measurement."""
    yield from pair.found.notes
    strangers = [name for name in pair.strangers if not name.endswith(_DERIVED)]
    if strangers:
        yield (
            f"{len(strangers)} tensors of the artifact have no place in the original's model and "
            f"were left aside: {', '.join(summarize_names(strangers)[:3])}"
        )


def _cut(windows: TokenWindows, count: int, tokens: int | None) -> TokenWindows:
    return replace(
        windows, ids=windows.ids[:count, :tokens], weights=windows.weights[:count, :tokens]
    )


def _measure_config(setting: Setting, pair: Pair) -> ConfigFinding | None:
    """Run both models' weights under the artifact's own config.

    None where the numbers in it are the original's.

    Raises:
        CheckpointError: the model that it describes has other tensors.
    """
    own, base = pair.found.checkpoint, pair.base.checkpoint
    words = None if own is None or base is None else compare_configs(own, base)
    if own is None or words is None:
        return None
    model = build_unchecked(own)
    expected, shapes = (
        {name: each.shape for name, each in skeleton.named_parameters() if name not in pair.ties}
        for skeleton in (pair.skeleton, model)
    )
    if expected != shapes:
        raise CheckpointError(f"{words}: the model that it describes has weights of other shapes")
    bench = replace(setting.bench, model=model)
    place_buffers(model, bench.device)
    own_scores, restored = measure(bench, setting.quick, [{}, setting.everything], "config")
    return ConfigFinding(words, own_scores, restored.mean_kl)


def _describe(
    answer: Answer,
    found: Inspection,
    base: Checkpoint,
    setting: Setting,
    *,
    artifact: str,
    notes: Sequence[str],
    seconds: float,
) -> Bisection:
    spec = setting.spec
    limits = {
        name: float(limit)
        for name in ("max_kl", "max_perplexity_increase", "min_top1_agreement")
        if (limit := getattr(spec, name)) is not None
    }
    return Bisection(
        artifact=artifact,
        baseline=base.source.name,
        format=found.format,
        scheme=found.scheme,
        outcome=answer.outcome,
        summary=answer.summary,
        windows=len(setting.quick.ids),
        window_tokens=setting.quick.ids.shape[1],
        kl=answer.scores.mean_kl,
        kl_restored=answer.scan.left,
        perplexity_increase=answer.scores.increase,
        top1_agreement=answer.scores.agreement,
        limits=limits,
        blocks=answer.blocks,
        units=answer.scan.units,
        guilty=answer.guilty,
        proposal=answer.proposal,
        judgement=answer.judgement,
        tensor_bytes=found.tensor_bytes,
        bits_per_weight=found.bits_per_weight,
        notes=tuple(dict.fromkeys((*notes, *answer.notes))),
        seconds=seconds,
    )
