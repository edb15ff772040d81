"""The measurement beside the models' own forwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.bisection.bench import measure, prepare, set_up
from quantkit.bisection.reading import open_base, open_weights
from quantkit.bisection.records import ORIGINAL
from quantkit.bisection.survey import find_flaws, pair_up, survey
from quantkit.calibration.data import load_tokenizer, load_windows
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.source import resolve_source
from quantkit.checkpoint.structure import find_groups
from quantkit.formats.inspect import inspect_artifact
from quantkit.numerics.divergence import compare_logits
from quantkit.running import silent
from tests.bisection.artifacts import DOWN, round_plainly


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_trials_are_what_the_whole_models_give(
    scheme: str, model: Path, text: Path, tmp_path: Path
) -> None:
    """The artifact as it is, with one layer restored, and with all: KL, nll and agreement.

    The reference is transformers' forward, for w8a8 with compressed-tensors' rounding of inputs.
    """
    folder = round_plainly(model, tmp_path / "out", {"scheme": scheme, "group_size": 32})
    base = open_checkpoint(resolve_source(str(model)))
    skeleton = build_skeleton(base)
    structure = find_groups(base, skeleton)
    weights = open_weights(inspect_artifact(folder), base)
    pair = pair_up(skeleton, structure, weights, open_base(base))
    units = find_flaws(list(survey(pair, silent)))
    bench = set_up(skeleton, pair, units, torch.device("cpu"), silent)
    windows = load_windows(
        str(text),
        split="test",
        text_column="text",
        tokenizer=load_tokenizer(model),
        samples=4,
        sequence_length=32,
        seed=0,
        order="sequential",
    )
    part = prepare(bench, windows)
    everything = {unit.name: ORIGINAL for unit in units}
    plain, one, restored = measure(bench, part, [{}, {DOWN: ORIGINAL}, everything], "test")
    assert restored.mean_kl < 1e-9

    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    artifact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(windows.ids)
    with torch.inference_mode():
        first, second = (each(input_ids=ids).logits[:, :-1] for each in (original, artifact))
    for number in range(len(ids)):
        expected = compare_logits(first[number], second[number], ids[number, 1:])
        at = plain.window == number
        torch.testing.assert_close(plain.kl[at].double(), expected.kl, rtol=0.01, atol=1e-6)
        torch.testing.assert_close(
            plain.nll[at].double(), expected.candidate_nll, rtol=1e-4, atol=1e-4
        )
        assert torch.equal(plain.agree[at].bool(), expected.agree)
    assert one.mean_kl != plain.mean_kl
