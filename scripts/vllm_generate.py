"""Load a checkpoint in vLLM, generate greedily, and save what it said as JSON.

Runs in vLLM's own environment and imports nothing of quantkit. The JSON holds vLLM's version and,
for each prompt, `prompt_ids`, `prompt_logprobs` (of each id but the first, in nats), `output_ids`
and `text`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import vllm

PROMPT_CHARACTERS = 600


def cut_prompts(text: str, count: int) -> list[str]:
    """Return `count` stretches of `text`, evenly spread."""
    stride = len(text) // count
    return [text[start : start + PROMPT_CHARACTERS] for start in range(0, stride * count, stride)]


def describe(output: Any) -> dict[str, Any]:
    """Return the JSON of one answer of vLLM."""
    ids = list(output.prompt_token_ids)
    logprobs = [
        entry[token].logprob
        for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    completion = output.outputs[0]
    return {
        "prompt_ids": ids,
        "prompt_logprobs": logprobs,
        "output_ids": list(completion.token_ids),
        "text": completion.text,
    }


def main() -> None:
    """Parse the arguments, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="where the prompts are cut from")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    prompts = cut_prompts(arguments.text.read_text(encoding="utf-8"), arguments.prompts)
    engine = vllm.LLM(str(arguments.model), enforce_eager=True, max_model_len=1024, seed=0)
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=arguments.new_tokens, prompt_logprobs=0
    )
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    answers = {"vllm": vllm.__version__, "prompts": [describe(output) for output in outputs]}
    arguments.output.write_text(json.dumps(answers), encoding="utf-8")


# vLLM starts its engine by importing this file again in another process.
if __name__ == "__main__":
    main()
