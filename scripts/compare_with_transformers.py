"""Compare what vLLM said (scripts/vllm_generate.py) with transformers on the same checkpoint.

The same ids go through transformers in the checkpoint's own precision. The runtimes multiply in
another order and round activations elsewhere, so they agree closely, not exactly: the check is
that the logarithm of the perplexity of the prompts differs by at most `MAX_NLL_DIFFERENCE`. Exits
1 where it does not, or where vLLM generated nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

MAX_NLL_DIFFERENCE = 0.005
"""Nats per token, that is half a percent of perplexity; bfloat16 alone was seen to make 0.0001."""


def score_prompt(model: torch.nn.Module, ids: list[int]) -> list[float]:
    """Return the log-probability of each id but the first, in nats."""
    window = torch.tensor([ids])
    logits = model(window).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, window[0, 1:, None])[:, 0].tolist()


def main() -> int:
    """Parse the arguments, compare, print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("answers", type=Path, help="what vllm_generate.py wrote")
    arguments = parser.parse_args()
    answers = json.loads(arguments.answers.read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()

    theirs: list[float] = []
    ours: list[float] = []
    equal = generated = 0
    with torch.inference_mode():
        for prompt in answers["prompts"]:
            theirs += prompt["prompt_logprobs"]
            ours += score_prompt(model, prompt["prompt_ids"])
            expected = model.generate(
                torch.tensor([prompt["prompt_ids"]]),
                attention_mask=torch.ones(1, len(prompt["prompt_ids"]), dtype=torch.long),
                max_new_tokens=len(prompt["output_ids"]),
                do_sample=False,
            )[0, len(prompt["prompt_ids"]) :].tolist()
            equal += sum(a == b for a, b in zip(prompt["output_ids"], expected, strict=False))
            generated += len(prompt["output_ids"])

    difference = abs(sum(ours) - sum(theirs)) / len(ours)
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{arguments.model} in vLLM {answers['vllm']}, {len(answers['prompts'])} prompts:")
    print(f"  generated      {answers['prompts'][0]['text'].strip()[:60]!r} ...")
    print(f"  perplexity     {perplexity(theirs):.3f}, in transformers {perplexity(ours):.3f}")
    print(f"  log-likelihood differs by {difference:.5f} nats in the mean, {largest:.3f} at most")
    print(f"  greedy tokens  {equal} of {generated} the same as in transformers")
    if not generated or not math.isfinite(difference) or difference > MAX_NLL_DIFFERENCE:
        print(f"  FAIL: the mean may differ by {MAX_NLL_DIFFERENCE} nats", file=sys.stderr)
        return 1
    return 0


def perplexity(logprobs: list[float]) -> float:
    """Return exp of the mean negative log-probability."""
    return math.exp(-sum(logprobs) / len(logprobs))


if __name__ == "__main__":
    sys.exit(main())
