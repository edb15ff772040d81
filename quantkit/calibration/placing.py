"""Weights put into the modules of a model on the meta device, and taken out again."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def hidden_features(model: nn.Module) -> int:
    """Return the features of the hidden states that a model's embedding gives."""
    return int(cast(Any, model).get_input_embeddings().weight.shape[-1])


def put(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Put a tensor in the place of a module's own parameter or buffer; elsewhere do nothing."""
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    elif leaf in module._buffers:
        module._buffers[leaf] = value


def empty(module: nn.Module) -> None:
    """Give a module's memory back: its parameters return to the meta device."""
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                meta = torch.empty_like(parameter, device="meta")
                part._parameters[leaf] = nn.Parameter(meta, requires_grad=False)
