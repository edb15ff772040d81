"""Keys and values on their way to the cache, as a model's own attention makes them.

transformers passes the function that computes attention the keyword arguments of the forward. The
one that is put there (`replaced_attention`) tells an observer what it was given, keys after their
norms and the rotary embedding and before they are repeated for the query heads, and goes on to what
computes scaled dot product attention. That is what a cache stores, whatever the architecture does
in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit.calibration.attention import Attend, replaced_attention
from quantkit.errors import CheckpointError
from quantkit.numerics.octaves import POSITIONS, measure_positions
from quantkit.records import KvCachePlan, KvStats

OBSERVER = "quantkit_kv_observer"
"""The keyword argument of a forward that holds the observer."""

Observer = Callable[[nn.Module, Tensor, Tensor], None]
"""Takes an attention module with its keys and values, both [B, kv_heads, T, head_dim]."""


@dataclass
class _Seen:
    """What was seen of one attention layer so far; see `KvStats`."""

    key_absmax: Tensor
    value_absmax: Tensor
    key_errors: Tensor
    tokens: int = 0


class KvWatch:
    """Collects the statistics of every attention layer of a plan."""

    def __init__(self, model: nn.Module, plan: KvCachePlan, device: torch.device) -> None:
        self._plan = plan
        self._device = device
        self._names = {model.get_submodule(name): name for name in plan.attentions}
        self._seen: dict[str, _Seen] = {}

    def observe(self, attention: nn.Module, key: Tensor, value: Tensor) -> None:
        """Take the keys and values of one micro-batch in; all tokens count.

        Raises:
            CheckpointError: their heads are not those of the plan.
        """
        name = self._names.get(attention)
        if name is None:
            return
        seen = self._seen.setdefault(name, self._nothing())
        for largest, states in ((seen.key_absmax, key), (seen.value_absmax, value)):
            found = states.abs().amax(dim=(0, 2)).float()
            if found.shape != largest.shape:
                raise CheckpointError(
                    f"{name} caches {list(found.shape)} (heads, channels) a token where the plan "
                    f"expected {list(largest.shape)}: its family data does not describe it"
                )
            # A NaN stays: the maximum of anything and a NaN is one.
            torch.maximum(largest, found, out=largest)
        seen.key_errors += measure_positions(key.float())
        seen.tokens += key.shape[0] * key.shape[2]

    def _nothing(self) -> _Seen:
        shape = (self._plan.kv_heads, self._plan.head_dim)
        errors = torch.zeros(
            POSITIONS, self._plan.kv_heads, dtype=torch.float64, device=self._device
        )
        return _Seen(
            torch.zeros(shape, device=self._device), torch.zeros(shape, device=self._device), errors
        )

    def take(self, block: str) -> KvStats:
        """Return what was seen of the attention layer in the block with the full name `block`.

        Raises:
            CheckpointError: nothing was seen, or something that is not finite.
        """
        name = next(name for name in self._plan.attentions if name.startswith(f"{block}."))
        seen = self._seen.pop(name, None)
        if seen is None:
            raise CheckpointError(
                f"the forward did not show the keys and values of {name}: its attention does not "
                f"go through transformers' AttentionInterface, so its cache cannot be quantized"
            )
        if not bool(torch.stack([seen.key_absmax, seen.value_absmax]).isfinite().all()):
            raise CheckpointError(
                f"keys or values of {name} are not finite: the model overflows on the calibration "
                f"data, so check the checkpoint and its dtype"
            )
        return KvStats(seen.key_absmax, seen.value_absmax, seen.tokens, seen.key_errors)


@contextmanager
def observed_attention(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Let the model's attention tell an observer what it caches; undo it afterwards.

    Inside, a forward takes the observer as its keyword argument `OBSERVER`.

    Args:
        attend: computes the attention.

    Raises:
        CheckpointError: the model does not use scaled dot product attention.
    """
    usual = cast(Any, model).config._attn_implementation
    if usual != "sdpa":
        raise CheckpointError(
            f"{type(model).__name__} computes attention by {usual!r}; keys and values are observed "
            f"in scaled dot product attention only, so its cache cannot be quantized"
        )
    with replaced_attention(model, partial(_observe, attend)):
        yield


def _observe(
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Tell the observer, then attend."""
    observer: Observer = options.pop(OBSERVER)
    observer(module, key, value)
    return attend(module, query, key, value, attention_mask, **options)
