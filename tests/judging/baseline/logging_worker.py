"""A worker without a runtime that writes down each request in LOG_FILE.

The folder that it loads holds model.json: `vocab` and `scale` make the logits of a token, `fault`
names what is wrong with them. FAKE_VERSION is the version that it says it has; without it, it says
none. FAKE_DEVICE is where it says that it computes. FAKE_DEAD and FAKE_UNLOADABLE name the script
that dies at its first request, or when it loads.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from pathlib import Path
from typing import Any


def main() -> None:
    log("start")
    role = Path(__file__).stem
    model: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        log(request["op"])
        if request["op"] == "versions":
            if os.environ.get("FAKE_DEAD") == role:
                sys.exit("no breath left")
            reply: dict[str, Any] = {"ok": "FAKE_VERSION" in os.environ}
            if reply["ok"]:
                reply["versions"] = {"fake": os.environ["FAKE_VERSION"]}
        elif request["op"] == "load":
            model = json.loads(Path(request["path"], "model.json").read_text())
            if os.environ.get("FAKE_UNLOADABLE") == role:
                sys.exit("no model")
            versions = {"fake": os.environ.get("FAKE_VERSION", "")}
            device = os.environ.get("FAKE_DEVICE", "cpu")
            reply = {"ok": True, "vocab": model["vocab"], "versions": versions, "device": device}
            reply["load_seconds"] = 1.25
        elif request["op"] == "logits":
            reply = write_logits(model, request)
        elif request["op"] == "generate":
            reply = {"ok": True, "ids": request["prompt_ids"][: request["max_new_tokens"]]}
        elif request["op"] == "continue":
            reply = {"ok": True, "ids": [ids[:1] for ids in request["prompts"]]}
        else:
            reply = {"ok": True, "memory_bytes": 5}
        print(json.dumps(reply), flush=True)


def write_logits(model: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    rows, vocab = request["ids"], model["vocab"]
    values = [
        model["scale"] * token / (column + 1)
        for row in rows
        for token in row
        for column in range(vocab)
    ]
    if model.get("fault") == "short":
        values = values[:-1]
    Path(request["file"]).write_bytes(array("f", values).tobytes())
    shape = [len(rows), len(rows[0]), vocab]
    return {"ok": True, "shape": shape, "finite": model.get("fault") != "nan"}


def log(word: str) -> None:
    with Path(os.environ["LOG_FILE"]).open("a") as file:
        print(f"{Path(__file__).stem} {word}", file=file)


if __name__ == "__main__":
    main()
