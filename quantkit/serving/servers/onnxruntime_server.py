"""Chat completions by ONNX Runtime GenAI: a script, run as `python onnxruntime_server.py FOLDER`.

It runs under the interpreter that has onnxruntime-genai; besides that it imports the standard
library only. FOLDER holds genai_config.json, its graph and the tokenizer. The protocol is that of
chat_http.py.

The conversation is rendered by the folder's own chat template, in onnxruntime-genai's renderer, and
tokenized as it stands: the template writes the tokens that begin a text. Sampling follows the
`search` of genai_config.json where a request says nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

# Run by its path, the script is part of no package, and PYTHONSAFEPATH hides its folder.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from chat_http import Answer, Served, listen  # type: ignore[import-not-found]
from chat_requests import ChatRequest, Refusal  # type: ignore[import-not-found]


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    given = read_arguments()
    served = Served(given.model_name, threading.BoundedSemaphore(given.concurrency))
    try:
        server = listen(given.host, given.port, served)
    except OSError as error:
        print(f"cannot listen on {given.host}:{given.port}: {error.strerror}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: interrupt())
    try:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # While it is loaded, /health says 503.
        served.begin = Chat(given.folder, given.context, given.threads).begin
        print(f"listening on http://{given.host}:{given.port}", file=sys.stderr, flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        # Threads may still be inside of the runtime, which is not torn down under them.
        os._exit(0)
    return 0


def interrupt() -> NoReturn:
    """End as Ctrl-C does."""
    raise KeyboardInterrupt


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Chat completions by ONNX Runtime GenAI.")
    parser.add_argument("folder", help="with genai_config.json")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model-name", default="model", help="of the one model, in the API")
    parser.add_argument("--context", type=int, help="tokens of prompt and answer together")
    parser.add_argument("--concurrency", type=int, default=1, help="answers made at a time")
    parser.add_argument("--threads", type=int, help="of the arithmetic")
    return parser.parse_args()


class Chat:
    """A loaded model, and how a conversation goes on with it."""

    def __init__(self, folder: str, context: int | None, threads: int | None) -> None:
        # The package collects usage data unless this is set before it is imported.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        with open(os.path.join(folder, "genai_config.json"), encoding="utf-8") as file:
            described = json.load(file)
        self.context = min(context or 1 << 31, int(described["model"]["context_length"]))
        config = onnxruntime_genai.Config(folder)
        if threads:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        self.tokenizer = onnxruntime_genai.Tokenizer(self.model)
        self.ends = frozenset(int(token) for token in self.tokenizer.eos_token_ids)

    def begin(self, request: ChatRequest) -> Answer:
        """Read the prompt and return the answer that follows.

        Raises:
            Refusal: the template cannot render the messages, or they are too long.
        """
        try:
            prompt = self.tokenizer.apply_chat_template(json.dumps(request.messages))
        # The renderer has no exception of its own.
        except Exception as error:
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Refusal(
                400, f"the chat template cannot render the messages: {words}", "messages"
            ) from None
        ids = self.tokenizer.encode(prompt)
        room = self.context - len(ids)
        if room < 1:
            raise Refusal(
                400,
                f"the messages are {len(ids)} tokens long; the context of {self.context} tokens "
                f"has to hold the answer as well",
                "messages",
                "context_length_exceeded",
            )
        length = min(room, request.max_tokens or room)
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(**self._options(request, len(ids) + length))
        generator = self.genai.Generator(self.model, parameters)
        generator.append_tokens(ids)
        answer = Answer(prompt_tokens=len(ids), pieces=iter(()))
        answer.pieces = self._pieces(generator, answer)
        return answer

    def _options(self, request: ChatRequest, length: int) -> dict[str, Any]:
        """Search options: the longest sequence, and what the request says of sampling."""
        options: dict[str, Any] = {"max_length": length}
        named = {
            "top_p": request.top_p,
            "top_k": request.top_k,
            "repetition_penalty": request.repetition_penalty,
            "random_seed": request.seed,
        }
        options |= {name: value for name, value in named.items() if value is not None}
        if request.temperature is not None:
            # A temperature of zero is the most probable token.
            options["do_sample"] = request.temperature > 0
            if request.temperature > 0:
                options["temperature"] = request.temperature
        return options

    def _pieces(self, generator: Any, answer: Answer) -> Iterator[str]:
        stream = self.tokenizer.create_stream()
        token = None
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            answer.completion_tokens += 1
            if token in self.ends:
                break
            piece = stream.decode(token)
            if piece:
                yield piece
        answer.finish_reason = "stop" if token in self.ends else "length"


if __name__ == "__main__":
    sys.exit(main())
