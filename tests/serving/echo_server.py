"""A server of the real protocol that says the last message again: a script of its own.

usage: python echo_server.py PORT MODEL BEHAVIOUR
  ok       answers
  dies     says why and ends with exit code 7
  silent   never listens
  nonsense answers chat completions with something else
  garbled  answers them with what is not HTTP
  drips    sends its answers byte by byte, and is never done
  trickles the same, and of chat completions the headers already
  child    answers, and has a child that SIGTERM does not end; its number is printed
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from typing import BinaryIO

SERVERS = os.path.join(
    os.path.dirname(__file__), os.pardir, os.pardir, "quantkit", "serving", "servers"
)
sys.path.insert(0, os.path.abspath(SERVERS))
from chat_http import (  # type: ignore[import-not-found]  # noqa: E402
    Answer,
    ChatHandler,
    Served,
    listen,
)
from chat_requests import ChatRequest, Refusal  # type: ignore[import-not-found]  # noqa: E402


def begin(request: ChatRequest) -> Answer:
    """Say each word of the last message."""
    text = request.messages[-1]["content"]
    if text == "fail":
        raise RuntimeError("the runtime has failed")
    if text == "refuse":
        raise Refusal(400, "this message is refused", "messages", "context_length_exceeded")
    words = [word + " " for word in text.split(" ")]
    words[-1] = words[-1][:-1]
    length = request.max_tokens or len(words)
    answer = Answer(prompt_tokens=3, pieces=iter(()))

    def pieces():  # type: ignore[no-untyped-def]
        for word in words[:length]:
            answer.completion_tokens += 1
            if word.startswith("slow"):
                time.sleep(0.2)
            if word.startswith("break"):
                raise RuntimeError("the runtime has failed in the middle")
            yield word
        answer.finish_reason = "stop" if length >= len(words) else "length"

    answer.pieces = pieces()
    return answer


def main() -> None:
    port, model, behaviour = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    print(f"a server that is {behaviour}", flush=True)
    if behaviour == "dies":
        print("cannot find the weights\x1b[2J", file=sys.stderr, flush=True)
        sys.exit(7)
    if behaviour == "silent":
        time.sleep(60)
    if behaviour == "child":
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", code])
        print(f"child {child.pid}", flush=True)
    served = Served(model, threading.BoundedSemaphore(2), begin)
    server = listen("127.0.0.1", port, served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if behaviour == "nonsense":
        ChatHandler._answer = lambda self, *_: self._send(200, {"choices": []})
    if behaviour == "garbled":
        ChatHandler._answer = lambda self, *_: self.wfile.write(b"this is a shop\r\n\r\n")
    if behaviour in ("drips", "trickles"):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"
        ChatHandler.do_GET = lambda self: drip(self.wfile, head + b"\r\n")
        end = b"\r\n" if behaviour == "drips" else b"Name: "
        ChatHandler._answer = lambda self, *_: drip(self.wfile, head + end)
    threading.Event().wait()


def drip(file: BinaryIO, beginning: bytes) -> None:
    """Send a beginning, and then a byte now and then until nobody listens."""
    file.write(beginning)
    with contextlib.suppress(OSError):
        while True:
            file.write(b"x")
            file.flush()
            time.sleep(0.1)


if __name__ == "__main__":
    main()
