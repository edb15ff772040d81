"""Perplexity and KL of an artifact against its baseline, with transformers and nothing of quantkit.

Reads the windows that llm_compressor.py (or anybody) saved as .npy, int64 [N, T], and scores
token t + 1 at position t. In float32 on the stored values, as quantkit's gate does on a CPU: in
bfloat16 the rounding noise of the two forwards adds about 0.001 nats of KL.

usage: python benchmarks/independent_check.py BASELINE ARTIFACT WINDOWS.npy
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

baseline, artifact = (
    AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in sys.argv[1:3]
)
nll_baseline = nll = kl = agreement = 0.0
windows = torch.from_numpy(np.load(sys.argv[3]))
with torch.inference_mode():
    for window in windows:
        p, q = (
            model(window[None]).logits[0, :-1].double().log_softmax(-1)
            for model in (baseline, artifact)
        )
        nll_baseline -= p.gather(-1, window[1:, None]).sum().item()
        nll -= q.gather(-1, window[1:, None]).sum().item()
        kl += (p.exp() * (p - q)).sum().item()
        agreement += (p.argmax(-1) == q.argmax(-1)).sum().item()
positions = windows[:, 1:].numel()
print(f"perplexity of the baseline  {np.exp(nll_baseline / positions):.6f}")
print(f"perplexity of the artifact  {np.exp(nll / positions):.6f}")
print(f"KL(baseline || artifact)    {kl / positions:.6f} nats per token")
print(f"top-1 agreement             {100 * agreement / positions:.3f} %")
