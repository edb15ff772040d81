"""Quantize a checkpoint to W4A16 with auto-round on given token windows.

Runs in auto-round's own environment (scripts/setup_rival.sh auto-round) and imports nothing of
quantkit. The presets are those of its command line: `default` is `auto_round` (200 iterations a
block) and `best` is `auto_round_best` (1,000). Everything else is its own default: symmetric,
groups of 128, lm_head left out. `best` asks for 512 samples of its own data; here both presets get
the windows that every contestant gets.

The artifact is written in its `llm_compressor` format: compressed-tensors with the tuned codes and
scales, which transformers loads exactly, without a package of auto-round's.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound

ITERATIONS = {"default": 200, "best": 1000}
BATCH = 8
"""Its default, for calibration and for a step of tuning."""


def main() -> None:
    """Parse the arguments, quantize, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True, help=".npy, int64 [N, T]")
    parser.add_argument("--preset", choices=list(ITERATIONS), required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    windows = torch.from_numpy(np.load(arguments.windows))
    compressor = AutoRound(
        str(arguments.model),
        scheme="W4A16",
        dataset=list(windows.split(BATCH)),
        iters=ITERATIONS[arguments.preset],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=BATCH,
        device_map="cpu",
    )
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as scratch:
        compressor.quantize_and_save(scratch, format="llm_compressor")
        (config,) = Path(scratch).rglob("config.json")
        shutil.move(config.parent, arguments.output)


if __name__ == "__main__":
    main()
