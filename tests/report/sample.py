"""A report made by hand, with numbers like those of a real job."""

from __future__ import annotations

import math
from dataclasses import replace

from quantkit.records import (
    ArtifactReport,
    Check,
    Judgement,
    LayerRecord,
    Measure,
    Metric,
    Report,
    Speed,
    Verdict,
)

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

RECIPE = """\
# 4-bit weights, chosen by calibration
version: 1
model: models/demo-llama
output: artifacts/demo-llama-awq4
calibration: {data: calib_data/docs_calibration.txt, samples: 128, sequence_length: 256}
quantize: {scheme: w4a16, group_size: 128, method: awq+gptq}
gate: {data: calib_data/docs_evaluation.txt, max_perplexity_increase: 3%, max_kl: 0.05}
"""

_FIGURES: dict[Verdict, tuple[float, float, float]] = {
    "PASS": (0.0183, 0.0123, 0.942),
    "FAIL": (0.0912, 0.0731, 0.872),
    "INCONCLUSIVE": (0.0287, 0.0123, 0.942),
}
"""Verdict -> perplexity increase, KL and agreement that lead to it."""


def make_report(
    verdict: Verdict = "PASS",
    *,
    model: str = "models/demo-llama",
    name: str = "demo-llama-awq4",
    blocks: int = 4,
    artifacts: int = 1,
    fallback: str | None = "rtn: the second moment is singular",
    statistics: bool = True,
) -> Report:
    """Return a report whose artifacts all have `verdict`."""
    judgement = make_judgement(verdict)
    rows = tuple(
        ArtifactReport(
            name=name if number == 0 else f"{name}-{number}",
            path="compressed-tensors",
            format="compressed-tensors",
            scheme="w4a16",
            size_bytes=4_113_408,
            bits_per_weight=5.2316,
            runtime="" if verdict == "UNJUDGED" else "transformers",
            judgement=judgement,
        )
        for number in range(artifacts)
    )
    return Report(
        model=model,
        baseline_bytes=12_582_912,
        artifacts=rows,
        verdict=verdict,
        layers=make_layers(blocks, fallback=fallback, statistics=statistics),
        notes=("lm_head is left in bfloat16: it matches ignore", "3 short rows were left out"),
        evidence=make_evidence(),
    )


def make_encoder_report(verdict: Verdict = "PASS", *, model: str = "org/encoder") -> Report:
    """Return a report on an INT8 embedding model, its speed included."""
    return replace(
        make_report(verdict, model=model, blocks=0),
        artifacts=(make_encoder_artifact(verdict),),
        evidence={},
    )


def make_encoder_artifact(
    verdict: Verdict = "PASS", *, name: str = "encoder-int8", size: int = 22_900_000
) -> ArtifactReport:
    """Return one row of such a report."""
    return ArtifactReport(
        name=name,
        path="onnx",
        format="onnx",
        scheme="w8a8",
        size_bytes=size,
        bits_per_weight=8.06,
        runtime="onnxruntime",
        judgement=make_encoder_judgement(verdict),
        task="embedding",
    )


def make_encoder_judgement(verdict: Verdict) -> Judgement:
    """Return the judgement of an embedding model with pairs."""
    if verdict == "UNJUDGED":
        return make_judgement(verdict)
    cosine = {"PASS": 0.9942, "FAIL": 0.9751, "INCONCLUSIVE": 0.9901}[verdict]
    checks = (
        make_check("min_cosine", 0.99, cosine, 0.0003),
        make_check("min_retrieval_overlap", 0.9, 0.9412, 0.0071),
        make_check("max_spearman_drop", 0.01, 0.0013, 0.0021),
    )
    speed = Speed(
        "sentences", "128 texts of 26 tokens on average", 64.88, 119.39, "onnxruntime 1.32.0", 2, 5
    )
    return replace(
        make_judgement("UNJUDGED"),
        verdict=verdict,
        checks=checks,
        reasons=tuple(check.name for check in checks if check.verdict != "PASS"),
        windows=1000,
        measures=(
            Measure("cosine", Metric(cosine, cosine - 0.0003, cosine + 0.0003)),
            Measure("cosine_p1", Metric(0.9811, 0.9702, 0.9843)),
            Measure("retrieval_overlap", Metric(0.9412, 0.9341, 0.9483)),
            Measure("spearman", Metric(0.8311, 0.829, 0.8332, baseline=0.8324)),
        ),
        speed=(speed,),
    )


def make_judgement(verdict: Verdict) -> Judgement:
    """Return the judgement that a gate with the default limits would give."""
    if verdict == "UNJUDGED":
        return Judgement(verdict, (), (), None, None, None, 0.95, 0)
    increase, kl, agreement = _FIGURES[verdict]
    checks = (
        make_check("max_perplexity_increase", 0.03, increase, 0.0031),
        make_check("max_kl", 0.05, kl, 0.00045),
        make_check("min_top1_agreement", 0.9, agreement, 0.0041),
    )
    reasons = tuple(
        f"{check.name}: {check.value:.4g} against a limit of {check.limit:g}"
        for check in checks
        if check.verdict != "PASS"
    )
    return Judgement(
        verdict=verdict,
        checks=checks,
        reasons=reasons,
        perplexity=Metric(
            value=12.4123 * (1 + increase),
            low=increase - 0.0031,
            high=increase + 0.0031,
            baseline=12.4123,
            increase=increase,
        ),
        kl=Metric(kl, kl - 0.00045, kl + 0.00045, p99=0.1423, maximum=2.716),
        top1_agreement=Metric(agreement, agreement - 0.0041, agreement + 0.0041),
        confidence=0.95,
        windows=128,
    )


def make_check(name: str, limit: float, value: float, half: float) -> Check:
    """Return a check with the verdict that its interval of `value` ± `half` means."""
    low, high = value - half, value + half
    sign = -1 if name.startswith("min_") else 1
    verdict: Verdict = "INCONCLUSIVE"
    if max(sign * low, sign * high) <= sign * limit:
        verdict = "PASS"
    elif min(sign * low, sign * high) > sign * limit:
        verdict = "FAIL"
    return Check(name, limit, value, low, high, verdict)


def make_layers(
    blocks: int, *, fallback: str | None = None, statistics: bool = True
) -> tuple[LayerRecord, ...]:
    """Return seven layers a block; the last block's down_proj has `fallback`."""
    return tuple(
        _layer(block, kind, fallback if (block, kind) == (blocks - 1, 6) else None, statistics)
        for block in range(blocks)
        for kind in range(len(LINEARS))
    )


def _layer(block: int, kind: int, fallback: str | None, statistics: bool) -> LayerRecord:
    wave = math.sin(2.1 * block + 1.7 * kind) + 0.6 * math.sin(0.37 * block * (kind + 1))
    rounding = 0.004 * (1 + kind) * math.exp(0.35 * wave + 0.02 * block)
    ours = rounding * (1.0 if fallback else 0.35 + 0.08 * math.cos(block + kind))
    return LayerRecord(
        name=f"model.layers.{block}.{LINEARS[kind]}",
        scheme="w4a16",
        group_size=128,
        method="awq+gptq",
        bits_per_weight=4.125,
        relative_error=ours if statistics else None,
        rtn_relative_error=rounding if statistics else None,
        weight_error=0.0071 + 0.0001 * kind,
        damping=0.01 if statistics else None,
        awq_exponent=0.05 * ((block + kind) % 12) if statistics and kind != 3 else None,
        fallback=fallback,
    )


def make_evidence() -> dict[str, object]:
    """Return evidence of every shape: plain values, tables, lists, a text."""
    return {
        "quantkit": "0.1.0",
        "recipe": {"text": RECIPE, "overrides": ["quantize.group_size=128"]},
        "model": {
            "name": "models/demo-llama",
            "revision": None,
            "files": {"config.json": "1c" * 32, "model.safetensors": "9f" * 32},
        },
        "calibration": {
            "source": "calib_data/docs_calibration.txt",
            "sha256": "ab" * 32,
            "windows": 128,
            "sequence_length": 256,
            "notes": [],
        },
        "evaluation": {
            "source": "calib_data/docs_evaluation.txt",
            "sha256": "cd" * 32,
            "windows": 128,
            "sequence_length": 512,
            "notes": ["the last 12 tokens do not fill a window"],
        },
        "versions": {"python": "3.12.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "compute": {"device": "cpu", "dtype": "float32"},
        "artifacts": [
            {
                "name": "demo-llama-awq4",
                "files": {"config.json": "37" * 32, "model.safetensors": "e0" * 32},
                "tensor_bytes": 4_113_408,
            }
        ],
        "timings": {
            "seconds": {"prepare": 1.2345, "quantize": 61.7, "gate": 83.21},
            "peak_memory_bytes": 812_646_400,
            "matmul_probe": {"device": "cpu", "float32_gflops": 115.2, "bfloat16_gflops": 411.6},
        },
    }
