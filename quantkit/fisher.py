"""Which outputs of a layer matter to the model, and which act together: the Fisher matrices.

For each position of the calibration windows a next token is drawn from the model's own
distribution, and the gradient g of its log-probability goes back through the blocks. The mean of
g g^T at the output of a linear layer is the layer's Fisher matrix, the curvature of the KL
divergence from the original model. Labels have to be drawn from the model: those of the text would
make it the empirical Fisher matrix, which is not that curvature (arXiv 1905.12558). Rounding uses
it (`solvers/coupled.py`).

The model goes by one block at a time: forwards, keeping what each block was given, and backwards,
each block computing its forward again. In memory are one block, the hidden states in front of all
blocks for at most 32,768 tokens, and what autograd keeps of a block for a micro-batch. All is
computed in float32 with the original's weights.

Shapes: N windows, T tokens of a window, H hidden size, O output features, V entries of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit.allocation.streams import (
    Recording,
    compute_logits,
    place_block,
    place_outside,
    record,
    run_block,
)
from quantkit.calibration.placing import empty
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.errors import CheckpointError
from quantkit.planning.sizes import FISHER_ENTRIES, FISHER_TOKENS
from quantkit.records import Event, LinearPlan, Plan, Progress, TokenWindows

_LOGITS_AT_ONCE = 1 << 24
"""Entries of the logits that are differentiated at a time."""

_SEED = 0


@dataclass(frozen=True)
class BlockFisher:
    """The Fisher matrices of a block's quantized layers.

    matrices: layer name -> float32 [O, B], whose entry [i, j] couples row i with row
    (i // B) * B + j; entries beyond O are zero.
    """

    index: int
    matrices: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Bench:
    """The model, with all in its place that is outside of the blocks, and its dry run."""

    model: nn.Module
    checkpoint: Checkpoint
    prefixes: tuple[str, ...]
    recording: Recording
    device: torch.device

    @contextmanager
    def placed(self, index: int) -> Iterator[nn.Module]:
        """Hold the weights of a block for a while."""
        place_block(self.model, self.checkpoint, self.prefixes[index], self.device)
        block = self.model.get_submodule(self.prefixes[index])
        try:
            yield block
        finally:
            empty(block)


def measure_fisher(
    checkpoint: Checkpoint,
    plan: Plan,
    windows: TokenWindows,
    *,
    device: torch.device,
    tell: Progress,
) -> Iterator[BlockFisher]:
    """Yield the Fisher matrices of all blocks with quantized layers, from the last block on.

    The same windows give the same matrices on the same machine.

    Args:
        windows: the calibration windows, of which the first ones are taken. Labels are drawn
            where tokens count.

    Raises:
        CheckpointError: the model's blocks cannot be run one by one, or its gradients are not
            finite.
    """
    count = max(1, FISHER_TOKENS // windows.ids.shape[1])
    bench = _set_up(checkpoint, plan, torch.from_numpy(windows.ids[:count]), device)
    steps = 2 * len(plan.blocks)
    inputs = [bench.recording.hidden]
    for index, prefix in enumerate(bench.prefixes):
        with bench.placed(index), torch.no_grad():
            output = run_block(
                bench.model, bench.prefixes, index, bench.recording, inputs[-1], device
            )
        inputs.append(output)
        tell(Event("fisher", index + 1, steps, prefix))
    gradient = _differentiate_head(bench, inputs.pop(), torch.from_numpy(windows.weights[:count]))
    for index in reversed(range(len(plan.blocks))):
        solved = [linear for linear in plan.blocks[index].linears if linear.solved]
        matrices = _go_back(bench, index, solved, inputs.pop(), gradient)
        tell(Event("fisher", steps - index, steps, bench.prefixes[index]))
        if matrices:
            yield BlockFisher(plan.blocks[index].index, matrices)


def _set_up(checkpoint: Checkpoint, plan: Plan, ids: Tensor, device: torch.device) -> _Bench:
    model, prefixes = build_skeleton(checkpoint), tuple(block.prefix for block in plan.blocks)
    place_outside(model, checkpoint, prefixes, device)
    # Not in inference mode: autograd could not use what was made there.
    with torch.no_grad():
        recording = record(model, prefixes, ids, device)
    return _Bench(model, checkpoint, prefixes, recording, device)


def _differentiate_head(bench: _Bench, hidden: Tensor, counted: Tensor) -> Tensor:
    """Return the gradient [N, T, H] of the drawn labels' negative log-probabilities.

    Args:
        hidden: float32 [N, T, H], behind the last block.
        counted: float32 [N, T], weights of the tokens.
    """
    generator = torch.Generator().manual_seed(_SEED)
    rows, weights = hidden.flatten(0, 1), counted.flatten()
    gradient = torch.empty_like(rows)
    vocabulary: int = cast(Any, bench.model).get_output_embeddings().weight.shape[0]
    for part in torch.arange(len(rows)).split(max(1, _LOGITS_AT_ONCE // vocabulary)):
        leaf = rows[part].to(bench.device).requires_grad_()
        logits = compute_logits(bench.model, bench.prefixes, leaf, bench.recording.in_tuple)
        draws = torch.rand(len(part), 1, generator=generator)
        slope = _slope_of_drawn(logits.detach(), draws.to(bench.device))
        # Squared gradients are averaged, so a token's weight enters by its root.
        slope *= weights[part].to(bench.device).sqrt().unsqueeze(1)
        (gradient[part],) = torch.autograd.grad(logits, leaf, slope)
    return gradient.reshape(hidden.shape)


def _slope_of_drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """Return softmax less one-hot [S, V], for the labels that `draws` [S, 1] in [0, 1) choose."""
    slope = logits.softmax(dim=-1)
    sums = slope.cumsum(dim=-1)
    labels = torch.searchsorted(sums, draws * sums[:, -1:]).clamp_(max=logits.shape[1] - 1)
    return slope.scatter_add_(1, labels, -torch.ones_like(draws))


def _go_back(
    bench: _Bench, index: int, linears: Sequence[LinearPlan], hidden: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Return the Fisher matrices of a block's quantized layers.

    Args:
        hidden: [N, T, H], what the block is given.
        gradient: [N, T, H] at the block's output; becomes the one at its input.
    """
    sums = {
        linear.name: torch.zeros(
            linear.out_features, _coupled_rows(linear.out_features), device=bench.device
        )
        for linear in linears
    }
    step = bench.recording.windows_at_once
    with bench.placed(index) as block, _watched(bench.model, sums):
        for number, calls in enumerate(bench.recording.calls):
            batch, call = slice(number * step, (number + 1) * step), calls[index]
            leaf = hidden[batch].to(bench.device).requires_grad_()
            output = block(leaf, *call.args, **call.kwargs)
            output = output[0] if isinstance(output, tuple) else output
            (slope,) = torch.autograd.grad(output, leaf, gradient[batch].to(bench.device))
            gradient[batch] = slope
    for name, matrix in sums.items():
        matrix /= hidden.shape[0] * hidden.shape[1]
        if not bool(matrix.isfinite().all()):
            raise CheckpointError(
                f"the gradient at the output of {name} is not finite: the model overflows on the "
                f"calibration data, so check the checkpoint and its dtype"
            )
    return sums


def _coupled_rows(rows: int) -> int:
    """Return the size of the diagonal blocks, which are equal but for the last one."""
    blocks = -(-rows * rows // FISHER_ENTRIES)
    return -(-rows // blocks)


@contextmanager
def _watched(model: nn.Module, sums: Mapping[str, Tensor]) -> Iterator[None]:
    """Add the products of the gradients at the outputs of the named layers to their sums."""

    def watch(total: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda slope: _add_products(total, slope))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(watch(total))
        for name, total in sums.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_products(total: Tensor, slope: Tensor) -> None:
    """Add g g^T of gradients [..., O], in diagonal blocks, to `total` [O, B]."""
    rows = slope.reshape(-1, slope.shape[-1])
    size = total.shape[1]
    for start in range(0, len(total), size):
        part = rows[:, start : start + size]
        total[start : start + size, : part.shape[1]].addmm_(part.T, part)
