"""A headless Chromium on two pipes, spoken to in the DevTools protocol; standard library only."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SECONDS = 60.0
"""Longest silence."""

_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@dataclass
class Tab:
    """One page, and every event that it sent since it was opened."""

    reads: int
    writes: int
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    rest: bytes = b""
    number: int = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask for one thing and wait for its answer; events on the way are kept."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def read(self) -> dict[str, Any]:
        """Return the next message."""
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.reads], [], [], _SECONDS)
            assert ready, f"Chromium was silent for {_SECONDS:.0f} seconds"
            found = os.read(self.reads, 1 << 20)
            assert found, "Chromium ended"
            self.rest += found
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def wait(self, event: str) -> None:
        """Read up to an event that is still to come."""
        while True:
            message = self.read()
            self.events.append(message)
            if message.get("method") == event:
                return

    def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        code = {"Tab": 9, "Enter": 13}[key]
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if (key, kind) == ("Enter", "keyDown") else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **text,
            )

    def click(self, x: float, y: float) -> None:
        """Press and release the left button at a place of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """Give the page a screen of so many CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def scheme(self, name: str) -> None:
        """Prefer `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.call("Emulation.setEmulatedMedia", features=features)


@contextmanager
def open_page(chromium: str, page: Path, profile: Path) -> Iterator[Tab]:
    """Open a file in a browser of its own, listened to from before it loads."""
    command = [chromium, *_FLAGS, f"--user-data-dir={profile}"]
    if os.geteuid() == 0:
        # Chromium refuses to run as root with its sandbox; the page is ours.
        command.append("--no-sandbox")
    process, reads, writes = _start([*command, "about:blank"])
    try:
        tab = Tab(reads, writes)
        (target,) = [
            each for each in tab.call("Target.getTargets")["targetInfos"] if each["type"] == "page"
        ]
        found = tab.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            tab.call(f"{domain}.enable")
        tab.events.clear()
        tab.call("Page.navigate", url=page.resolve().as_uri())
        if not any(each.get("method") == "Page.loadEventFired" for each in tab.events):
            tab.wait("Page.loadEventFired")
        yield tab
    finally:
        _stop(process)
        os.close(reads)
        os.close(writes)


def _start(command: list[str]) -> tuple[int, int, int]:
    """Start Chromium, which reads from descriptor 3 and writes to 4. Returns process and ends."""
    theirs_in, writes = os.pipe()
    reads, theirs_out = os.pipe()
    # Moved away from 3 and 4 themselves, so that neither takes the other's place.
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
    null = os.open(os.devnull, os.O_RDWR)
    actions = [
        (os.POSIX_SPAWN_DUP2, moved[0], 3),
        (os.POSIX_SPAWN_DUP2, moved[1], 4),
        *((os.POSIX_SPAWN_DUP2, null, number) for number in (0, 1, 2)),
    ]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setpgroup=0)
    for end in (theirs_in, theirs_out, null, *moved):
        os.close(end)
    return process, reads, writes


def _stop(process: int) -> None:
    """End the browser and the processes that it started."""
    os.killpg(process, signal.SIGTERM)
    for _ in range(100):
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
