"""Statistics of inputs against those of the inputs themselves, taken text by text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkit.encoders.observing import BINS, observe
from quantkit.errors import CalibrationError
from quantkit.records import InputStats
from tests.encoders.cases import Case, make_case


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("encoder"))


def _inputs_of(case: Case, name: str) -> Tensor:
    """What a layer reads of each text alone, without padding."""
    seen: list[Tensor] = []
    module = case.model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    for ids, types in zip(case.rows.ids, case.rows.type_ids, strict=True):
        batch = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            "token_type_ids": torch.tensor([types]),
        }
        case.model(**{name: batch[name] for name in case.plan.info.inputs})
    hook.remove()
    return torch.cat(seen)


def test_padding_does_not_count(case: Case) -> None:
    """The texts have different lengths, and every statistic is that of their own tokens."""
    stats = observe(case.model, case.plan, case.rows)
    assert list(stats) == [group.linears[0].name for group in case.plan.groups]
    assert len({len(ids) for ids in case.rows.ids}) > 3
    for name in list(stats)[-3:]:
        inputs, found = _inputs_of(case, name), stats[name]
        assert found.tokens == len(inputs)
        assert torch.allclose(
            found.second_moment, inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4
        )
        assert torch.allclose(found.mean, inputs.mean(0), atol=1e-4)
        assert torch.allclose(found.absmax, inputs.abs().amax(0), atol=1e-4)
        assert found.lowest is not None
        assert found.highest is not None
        assert torch.allclose(found.lowest, inputs.amin(0), atol=1e-4)
        assert torch.allclose(found.highest, inputs.amax(0), atol=1e-4)


def test_the_histogram_is_that_of_all_values(case: Case) -> None:
    name = case.plan.groups[-1].linears[0].name
    found, inputs = observe(case.model, case.plan, case.rows)[name], _inputs_of(case, name)
    assert found.counts.sum() == inputs.numel()
    assert (found.minimum, found.maximum) == pytest.approx(
        (float(inputs.min()), float(inputs.max())), abs=1e-4
    )
    expected, _ = np.histogram(inputs.double().numpy(), BINS, range=(found.minimum, found.maximum))
    # A value may lie on the other side of an edge.
    lag = np.abs(np.cumsum(found.counts) - np.cumsum(expected))
    assert lag.max() <= expected.max()


def test_the_sample_holds_tokens(case: Case) -> None:
    name = case.plan.groups[0].linears[0].name
    found, inputs = observe(case.model, case.plan, case.rows)[name], _inputs_of(case, name)
    # Different tokens are several units apart.
    nearest = torch.cdist(found.sample, inputs).amin(dim=1)
    assert len(found.sample) >= min(100, len(inputs))
    assert float(nearest.max()) < 0.05


def test_observing_twice_gives_the_same(case: Case) -> None:
    first, second = (observe(case.model, case.plan, case.rows) for _ in range(2))

    def same(one: InputStats, other: InputStats) -> bool:
        return torch.equal(one.second_moment, other.second_moment) and torch.equal(
            one.sample, other.sample
        )

    assert all(same(first[name], second[name]) for name in first)
    assert not any(module._forward_pre_hooks for module in case.model.modules())


def test_an_input_that_is_not_finite_is_named(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    name = case.plan.groups[1].linears[0].name
    value = case.model.get_submodule(case.plan.groups[0].linears[2].name)
    value.bias = nn.Parameter(torch.full_like(value.get_parameter("bias"), torch.nan))
    with pytest.raises(CalibrationError, match=f"input of {name} is not finite"):
        observe(case.model, case.plan, case.rows)


def test_no_text_is_an_error(case: Case) -> None:
    with pytest.raises(CalibrationError, match="no calibration text reached"):
        observe(case.model, case.plan, replace(case.rows, ids=(), type_ids=()))
