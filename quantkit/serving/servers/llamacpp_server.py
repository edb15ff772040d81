"""llama.cpp's own HTTP server out of the wheel xllamacpp: `python llamacpp_server.py -m FILE`.

It runs under the interpreter that has the wheel, and takes the options of `llama-server` that
quantkit writes, by the same names.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from typing import NoReturn


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    given = read_arguments()
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = given.m
    parameters.hostnames = [given.host]
    parameters.port = given.port
    parameters.n_ctx = given.c
    parameters.n_parallel = given.np
    parameters.n_gpu_layers = given.ngl
    kinds = {"f16": xllamacpp.ggml_type.GGML_TYPE_F16, "q8_0": xllamacpp.ggml_type.GGML_TYPE_Q8_0}
    parameters.cache_type_k = kinds[given.ctk]
    parameters.cache_type_v = kinds[given.ctv]
    parameters.model_alias = {given.a}
    key = os.environ.get("LLAMA_API_KEY")
    if key:
        # As llama-server does.
        parameters.api_keys = [key]
    if given.t:
        parameters.cpuparams.n_threads = given.t
    signal.signal(signal.SIGTERM, lambda *_: interrupt())
    try:
        server = xllamacpp.Server(parameters)
        print(f"listening on {server.listening_address}", file=sys.stderr, flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print(f"llama.cpp cannot serve {given.m}: {error}", file=sys.stderr, flush=True)
    return 1


def interrupt() -> NoReturn:
    """End as Ctrl-C does."""
    raise KeyboardInterrupt


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="llama.cpp's server, from the wheel xllamacpp.")
    parser.add_argument("-m", required=True, help="GGUF file, the first part of a split one")
    parser.add_argument("-c", type=int, required=True, help="tokens of all slots together")
    parser.add_argument("-np", type=int, required=True, help="slots")
    parser.add_argument("-ngl", type=int, default=0, help="layers on the GPU")
    parser.add_argument("-ctk", choices=("f16", "q8_0"), default="f16")
    parser.add_argument("-ctv", choices=("f16", "q8_0"), default="f16")
    parser.add_argument("-a", default="model", help="the model's name in the API")
    parser.add_argument("-t", type=int, help="threads")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
