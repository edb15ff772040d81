"""Solvers: (weights, statistics, plan) -> quantized layers. They see tensors, never files."""

from quantkit.solvers.awq import choose_fold
from quantkit.solvers.bias import correct_bias
from quantkit.solvers.candidates import FoldChoice
from quantkit.solvers.fold import (
    collapse_heads,
    expand_heads,
    fold_into_bias,
    fold_into_dense,
    fold_into_layer,
    fold_into_norm,
    scale_stats,
)
from quantkit.solvers.ggml import GgmlSolution, solve_ggml, solve_ggml_group
from quantkit.solvers.group import Solution, measure_weights, output_energy, solve_group
from quantkit.solvers.inputs import (
    add_input_noise,
    choose_input_scale,
    output_error,
    shift_of_mean,
)
from quantkit.solvers.kvscale import choose_kv_scales, divide_values
from quantkit.solvers.smoothquant import choose_smoothing
from quantkit.solvers.target import follow_drift

__all__ = [
    "FoldChoice",
    "GgmlSolution",
    "Solution",
    "add_input_noise",
    "choose_fold",
    "choose_input_scale",
    "choose_kv_scales",
    "choose_smoothing",
    "collapse_heads",
    "correct_bias",
    "divide_values",
    "expand_heads",
    "fold_into_bias",
    "fold_into_dense",
    "fold_into_layer",
    "fold_into_norm",
    "follow_drift",
    "measure_weights",
    "output_energy",
    "output_error",
    "scale_stats",
    "shift_of_mean",
    "solve_ggml",
    "solve_ggml_group",
    "solve_group",
]
