"""Judging worker for encoders in transformers: a script, run as `python encoder_worker.py`.

It may run under another interpreter than quantkit's, so it imports the standard library, torch and
transformers only. Requests come as JSON, one line each, on standard input; each gets one line of
JSON on standard output. The end of the input, or `exit`, ends the worker.

    {"op": "load", "path", "device": "auto"|"cpu"|"cuda", "threads", "task": "embedding"|
     "sequence-classification"|"token-classification", "pooling": null|{"mode", "normalize"}}
        -> {"ok": true, "device", "versions": {...}}
    {"op": "encode", "batch": {"input_ids": [[...], ...], "attention_mask", "token_type_ids"},
     "file"}
        -> {"ok": true, "shape": [B, H] | [B, C] | [B, T, C]}; the raw float32 numbers are in `file`
    {"op": "time", "batches": [batch, ...]} -> {"ok": true, "seconds"}, one pass over all of them
    {"op": "exit"} -> {"ok": true}
    what went wrong -> {"ok": false, "kind": "memory"|"disk"|"package"|"other", "error", "package"}

The arithmetic is float32 on exactly the values that are stored, on every device. Letters of shapes:
B texts, T tokens, H width of an embedding, C classes.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

# Run by its path, the script is part of no package, and PYTHONSAFEPATH hides its folder.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from encoder_protocol import Reply, Rows, answer_encodings  # type: ignore[import-not-found]
from worker_protocol import (  # type: ignore[import-not-found]
    FAILURES,
    find_versions,
    loading_libraries,
    quicken_float32,
    serve,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CLASSES = {
    "embedding": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
"""Task -> the class of transformers that loads it."""

UNUSED = "pooler."
"""Part of the names of tensors that no embedding needs: BERT's own pooler, which checkpoints that
were trained without it lack."""

PACKAGES = ("torch", "transformers")
"""Whose versions the evidence names."""

OUT_OF_MEMORY = "allocate memory"
"""Words of torch on a CPU."""


def main() -> int:
    """Serve requests from standard input until it ends."""
    # Libraries raise a KeyError for a file that lacks something.
    failures = (*FAILURES, KeyError)
    return int(serve(answer_encodings(load, _tensors), failures, OUT_OF_MEMORY, PACKAGES))


def load(request: Reply) -> tuple[Any, Reply]:
    """Load the checkpoint in the request's folder; return what computes a batch, and the answer.

    Raises:
        ValueError: tensors are missing or have the wrong shape; transformers would fill them with
            random numbers and go on. Or there is an adapter.
    """
    path, task, pooling = request["path"], request["task"], request["pooling"]
    with loading_libraries():
        import torch
        import transformers

        models = getattr(transformers, CLASSES[task])
    if not os.path.isdir(path):
        raise ValueError(f"{path} is not a folder")
    # transformers would apply it unasked where peft is installed, and servers would not.
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        raise ValueError(f"{path} holds an adapter (adapter_config.json): merge it first")
    torch.set_num_threads(request["threads"])
    quicken_float32()
    transformers.utils.logging.disable_progress_bar()
    device = request["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, found = models.from_pretrained(
        path,
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    for fault in ("missing_keys", "mismatched_keys"):
        names = sorted(
            str(name) for name in found[fault] if task != "embedding" or UNUSED not in str(name)
        )
        if names:
            raise ValueError(f"{len(names)} {fault.replace('_', ' ')}, for instance {names[0]}")
    model = model.eval().to(device)

    def run(batch: dict[str, Tensor]) -> np.ndarray:
        with torch.inference_mode():
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            output = model(**inputs)
            if task != "embedding":
                return output.logits.float().cpu().numpy()
            hidden = output.last_hidden_state.float()
            return pool(hidden, inputs["attention_mask"], pooling).cpu().numpy()

    return run, {
        "ok": True,
        "device": device,
        "versions": find_versions(*PACKAGES),
    }


def pool(hidden: Tensor, mask: Tensor, pooling: Reply) -> Tensor:
    """Return one vector [B, H] a text from `hidden` [B, T, H], as sentence-transformers does.

    Args:
        hidden: vectors of the tokens.
        mask: [B, T], 0 for padding.
        pooling: `mode` (mean, cls: the first token's, max) and `normalize`.

    Raises:
        ValueError: the mode is unknown.
    """
    import torch

    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling["mode"] == "mean":
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    elif pooling["mode"] == "cls":
        pooled = hidden[:, 0]
    elif pooling["mode"] == "max":
        pooled = hidden.masked_fill(weights == 0, -torch.inf).amax(dim=1)
    else:
        raise ValueError(f"pooling {pooling['mode']!r} is unknown")
    return torch.nn.functional.normalize(pooled, dim=1) if pooling["normalize"] else pooled


def _tensors(batch: Rows) -> dict[str, Tensor]:
    import torch

    return {name: torch.tensor(rows) for name, rows in batch.items()}


if __name__ == "__main__":
    sys.exit(main())
