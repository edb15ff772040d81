"""Run an ONNX graph in a process that has nothing but ONNX Runtime and NumPy.

Run as a script: `graph_runner.py GRAPH INPUTS OUTPUTS THREADS NAME...`. INPUTS is an .npz file with
an array `<number>.<input>` for each input of each batch; OUTPUTS gets one with `<number>.<name>`
for each output that is named. Nothing of quantkit is imported.
"""

from __future__ import annotations

import os
import sys

# The folder of this script has modules of its own, which no package should find by their names.
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]


def main(graph: str, inputs: str, outputs: str, threads: str, *names: str) -> None:
    """Run every batch; see the module."""
    # ONNX Runtime opens a file and threads for telemetry, unless told before its import.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = {}
    with np.load(inputs, allow_pickle=False) as arrays:
        for number in sorted({key.partition(".")[0] for key in arrays}, key=int):
            head = f"{number}."
            feed = {key.removeprefix(head): arrays[key] for key in arrays if key.startswith(head)}
            for name, values in zip(names, session.run(list(names), feed), strict=True):
                found[head + name] = values
    np.savez(outputs, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
