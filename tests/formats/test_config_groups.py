"""Which group of a config a layer is in, against compressed-tensors' own matching."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import ArtifactError
from quantkit.formats.config_groups import (
    check_expressions,
    count_malformed_groups,
    find_config_groups,
    find_ignored,
    is_ignored,
    order_groups,
)

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
NAMES = [
    f"model.layers.{block}.{part}"
    for block in (0, 1, 10)
    for part in ("self_attn.q_proj", "mlp.down_proj")
] + ["lm_head"]
TARGETS = [
    *NAMES,
    "Linear",
    "re:.*q_proj$",
    "re:.*self_attn.*",
    r"re:model\.layers\.1\.",
    "re:.*down",
    "re:lm_head",
]


def _config(*targets: list[str], ignore: list[str] | None = None) -> dict[str, Any]:
    """One group for each list of targets, told apart by its group size."""
    groups = {
        f"group_{index}": {"weights": {**WEIGHTS, "group_size": 32 << index}, "targets": names}
        for index, names in enumerate(targets)
    }
    described = {"config_groups": groups, "ignore": ignore or [], "format": "pack-quantized"}
    return {"quantization_config": described}


def _claim(config: dict[str, Any], name: str) -> int | None:
    """Position of the group that a layer is in, as we have it."""
    groups = find_config_groups(config)
    if is_ignored(name, find_ignored(config)):
        return None
    found = order_groups(name, groups)
    return groups.index(found[0]) if found else None


@settings(deadline=None, max_examples=50)
@given(
    targets=st.lists(
        st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3, unique=True),
        min_size=1,
        max_size=3,
    ),
    ignore=st.lists(st.sampled_from(TARGETS), max_size=2),
)
def test_layers_are_in_the_group_that_compressed_tensors_puts_them_in(
    targets: list[list[str]], ignore: list[str]
) -> None:
    """For exact names, expressions and classes, and whatever is ignored."""
    config = _config(*targets, ignore=ignore)
    module = torch.nn.Linear(1, 1)
    for name in NAMES:
        matched = match_targets(name, module, [each for names in targets for each in names])
        if not matched or is_match(name, module, ignore):
            assert _claim(config, name) is None
            continue
        # Readers disagree on the order of expressions: any that matches may come first.
        first = [each for each in matched if each.startswith("re:") == matched[0].startswith("re:")]
        equal = first if matched[0].startswith("re:") else [matched[0]]
        assert _claim(config, name) in {
            index for index, names in enumerate(targets) if set(equal) & set(names)
        }


def test_another_class_is_tried_last() -> None:
    """The name of a class tells little without the module: the shapes decide."""
    groups = find_config_groups(_config(["Embedding"], ["Linear"], ["lm_head"]))
    assert order_groups("lm_head", groups) == [groups[2], groups[1], groups[0]]
    assert order_groups("model.embed", groups) == [groups[1], groups[0]]


def test_an_expression_that_never_ends_is_stopped() -> None:
    """A config is somebody else's text: one that backtracks for years is refused in seconds."""
    config = _config(["re:(a|aa)+$"])
    started = time.monotonic()
    with pytest.raises(ArtifactError, match="cannot be matched"):
        check_expressions(config, ["a" * 80 + "b", "c"])
    assert time.monotonic() - started < 30


def test_an_expression_that_is_none_is_an_error() -> None:
    """Named, so that it can be mended."""
    with pytest.raises(ArtifactError, match=r"re:\(\["):
        check_expressions(_config(["re:(["]), ["lm_head"])


@pytest.mark.parametrize(
    "weights",
    [
        None,
        {"num_bits": 16, "type": "int"},
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        {"num_bits": 8, "type": "float", "strategy": "block"},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": None},
        {"num_bits": True, "type": "int", "strategy": "channel"},
    ],
)
def test_groups_that_are_not_understood_are_counted(weights: Any) -> None:
    """Left out of the groups, and not silently."""
    config = _config(["Linear"])
    config["quantization_config"]["config_groups"]["other"] = {
        "weights": weights,
        "targets": ["lm_head"],
    }
    assert len(find_config_groups(config)) == 1
    assert count_malformed_groups(config) == 1


def test_what_a_config_leaves_out_is_inferred_as_the_library_does() -> None:
    """No strategy, no format: a group size means groups, weights alone are packed."""
    config = _config(["Linear"])
    group = config["quantization_config"]["config_groups"]["group_0"]
    del group["weights"]["strategy"], config["quantization_config"]["format"]
    (found,) = find_config_groups(config)
    assert (found.layout.strategy, found.layout.packed) == ("group", True)
    group["weights"] = {"num_bits": 8, "type": "int", "group_size": -1}
    group["input_activations"] = {
        "num_bits": 8,
        "type": "int",
        "strategy": "token",
        "dynamic": True,
    }
    (found,) = find_config_groups(config)
    assert (found.layout.strategy, found.layout.packed) == ("channel", False)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["re:(?R)?m"], "no reader knows recursion"),
        (["re:" + "m" * 2000], "more than 1024 characters"),
        ([f"re:m{number}" for number in range(300)], "300 regular expressions"),
        (["re:a{999999999}"], "more than 10000 times"),
        (["re:(?:(?:m{90}){90}){90}"], "more than 10000 times"),
    ],
)
def test_expressions_that_take_all_memory_or_are_endless_many_are_refused(
    targets: list[str], words: str
) -> None:
    """Recursion takes a gigabyte a second of the library that matches."""
    with pytest.raises(ArtifactError, match=words):
        check_expressions(_config(targets), NAMES)


def test_slow_expressions_are_slow_together() -> None:
    """Each ends in time, and all of them would take minutes."""
    slow = [f"re:(.*)(.*)(.*)[b-d]{{{number}}}$" for number in range(1, 200)]
    begun = time.process_time()
    with pytest.raises(ArtifactError, match="cannot be matched"):
        check_expressions(_config(slow), ["a" * 90] * 1000)
    assert time.process_time() - begun < 30


def test_more_groups_than_layers_can_be_looked_for_in_are_refused() -> None:
    """Each layer is compared with every group."""
    with pytest.raises(ArtifactError, match="1025 config_groups"):
        find_config_groups(_config(*[["Linear"]] * 1025))
