"""A worker that speaks the protocol with a bigram table for a model, and misbehaves on request.

The folder that it loads holds fake.json: `vocab` and `seed` make the table, `fault` names what to
do wrong when logits are asked for. It leaves a file `<pid>.pid` there, and rows.txt, which says how
many windows each request for logits had.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def make_table(vocab: int, seed: int) -> np.ndarray:
    """Logits float32 [V, V]: row i follows token i."""
    return np.random.default_rng(seed).normal(0, 2, (vocab, vocab)).astype(np.float32)


def main() -> None:
    model: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "load":
            folder = Path(request["path"])
            model = json.loads((folder / "fake.json").read_text()) | {"folder": str(folder)}
            (folder / f"{os.getpid()}.pid").touch()
            (folder / "environment.json").write_text(json.dumps(dict(os.environ)))
            reply = {
                "ok": True,
                "vocab": model["vocab"],
                "dtype": "float32",
                "device": "cpu",
                "positions": model.get("positions", 4096),
                "versions": {"fake": "1"},
                "load_seconds": 0.25,
                "unexpected": model.get("unexpected", []),
            }
        elif request["op"] == "logits":
            reply = misbehave(model.get("fault", ""), request) or write_logits(model, request)
        elif request["op"] == "generate":
            rng = np.random.default_rng(model["seed"])
            ids = rng.integers(0, model["vocab"], request["max_new_tokens"]).tolist()
            reply = {"ok": True, "ids": [3] * 64 if model.get("fault") == "loop" else ids}
        elif request["op"] == "versions":
            reply = {"ok": True, "versions": {"fake": "1"}}
        elif request["op"] == "usage":
            reply = {"ok": True, "memory_bytes": model.get("memory", 1 << 20)}
        elif request["op"] == "continue":
            rng = np.random.default_rng(model["seed"])
            shape = (len(request["prompts"]), request["max_new_tokens"])
            rows = rng.integers(0, model["vocab"], shape).tolist()
            looping = [[3] * shape[1]] * shape[0]
            reply = {"ok": True, "ids": looping if model.get("fault") == "loop" else rows}
        else:
            reply = {"ok": True}
        print(json.dumps(reply), flush=True)
        if request["op"] == "exit":
            return


def write_logits(model: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    with Path(model["folder"], "rows.txt").open("a") as file:
        print(len(request["ids"]), file=file)
    logits = make_table(model["vocab"], model["seed"])[np.array(request["ids"])]
    if model.get("fault") == "nan":
        logits[0, 0, 0] = np.nan
    logits.tofile(request["file"])
    return {"ok": True, "shape": list(logits.shape), "finite": bool(np.isfinite(logits).all())}


def misbehave(fault: str, request: dict[str, Any]) -> dict[str, Any] | None:
    if fault == "hang":
        time.sleep(600)
    elif fault == "exit":
        print("first words", file=sys.stderr)
        print("out of \x1b[31mcheese", file=sys.stderr)
        sys.exit(7)
    elif fault == "orphan":
        # It inherits the pipes, which do not end with this process.
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", file=sys.stderr, flush=True)
        os._exit(7)
    elif fault == "kill":
        print("so long", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "nonsense":
        print("hello, world", flush=True)
        time.sleep(600)
    elif fault == "list":
        print("[true]", flush=True)
        time.sleep(600)
    elif fault == "flood":
        sys.stdout.write("x" * (3 << 20))
        time.sleep(600)
    elif fault == "noise":
        sys.stderr.write("y" * (8 << 20) + "\n")
    elif fault == "twice":
        print('{"ok": true}', flush=True)
    elif fault == "short":
        Path(request["file"]).write_bytes(b"\0" * 8)
        shape = [len(request["ids"]), len(request["ids"][0]), 11]
        return {"ok": True, "shape": shape, "finite": True}
    elif fault == "shape":
        Path(request["file"]).write_bytes(b"\0" * 8)
        return {"ok": True, "shape": [1, 1, 2], "finite": True}
    elif fault in ("memory", "disk", "package", "other"):
        return {"ok": False, "kind": fault, "error": f"no {fault} left", "package": "torch"}
    return None


if __name__ == "__main__":
    main()
