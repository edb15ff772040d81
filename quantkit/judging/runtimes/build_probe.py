"""What the builds of torch and ONNX Runtime compute on: a script, run as `python build_probe.py`.

It runs under a runtime's interpreter, imports the standard library and ONNX Runtime only, and
prints one line of JSON: {"torch": "cpu"|"cuda"|null, "providers": [names]|null}; null where there
is none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Print what is found."""
    sys.stdout.write(json.dumps({"torch": find_torch(), "providers": find_providers()}) + "\n")


def find_torch() -> str | None:
    """The build of torch, from its own file, without the seconds that its import takes."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    facts: dict[str, Any] = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    return "cuda" if facts.get("cuda") else "cpu"


def find_providers() -> list[str] | None:
    """The execution providers of ONNX Runtime."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    # It collects usage data unless this is set before it is imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    names: list[str] = onnxruntime.get_available_providers()
    return [name.removesuffix("ExecutionProvider") for name in names]


if __name__ == "__main__":
    main()
