"""Drive headless Chromium by its own protocol, with nothing but the websocket client of Jupyter."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import websocket

T = TypeVar("T")
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-port=0", "--window-size=1200,1500",
)  # fmt: skip
KEYS = {"Enter": (13, "\r"), "a": (65, None), "s": (83, None)}
CONTROL, SHIFT = 2, 8


class Browser:
    """One page of a browser."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=90)
        self.number = 0
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are dropped."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """Evaluate JavaScript, wait for its promise, return its value."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        until(lambda: self.run("document.readyState") == "complete")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        code, text = KEYS[key]
        about = {"key": key, "code": key if len(key) > 1 else f"Key{key.upper()}"}
        about |= {"windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {})
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


def until(ready: Callable[[], T], seconds: float = 60) -> T:
    """Ask until the answer is true; return it."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.1)
    return found


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser whose profile lies in `folder`."""
    assert PROGRAM
    command = [PROGRAM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    try:
        port_file = folder / "DevToolsActivePort"
        until(lambda: port_file.exists() and port_file.read_text().count("\n"))
        port = port_file.read_text().splitlines()[0]
        (page,) = [p for p in until(lambda: pages(port)) if p["type"] == "page"]
        yield Browser(page["webSocketDebuggerUrl"])
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


def pages(port: str) -> list[dict[str, str]]:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{port}/json/list", timeout=20) as answer:
        return list(json.load(answer))
