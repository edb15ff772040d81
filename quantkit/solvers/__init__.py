"""Solvers: (weights, statistics, plan) -> quantized layers. They see tensors, never files."""

from quantkit.solvers.awq import FoldChoice, choose_fold
from quantkit.solvers.fold import (
    collapse_heads,
    fold_into_bias,
    fold_into_dense,
    fold_into_layer,
    fold_into_norm,
    scale_stats,
)
from quantkit.solvers.group import Solution, measure_weights, output_energy, solve_group

__all__ = [
    "FoldChoice",
    "Solution",
    "choose_fold",
    "collapse_heads",
    "fold_into_bias",
    "fold_into_dense",
    "fold_into_layer",
    "fold_into_norm",
    "measure_weights",
    "output_energy",
    "scale_stats",
    "solve_group",
]
