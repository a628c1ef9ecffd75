"""Headless Chromium, driven over the DevTools protocol; enough to look at one page."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_SECONDS_MAX = 60.0
ANSWER_SECONDS_MAX = 60.0


def find_browser() -> str:
    """The browser's path; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser on this machine; looked for {', '.join(NAMES)}")
    return found


class Page:
    """One tab. Use as an async context manager; `problems` are errors and refused resources."""

    def __init__(self, directory: Path, *, width: int = 1280, height: int = 900) -> None:
        self.directory = directory
        self.size = (width, height)
        self.problems: list[str] = []
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0

    async def __aenter__(self) -> Page:
        self._process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [
                find_browser(),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--remote-debugging-port=0",
                f"--user-data-dir={self.directory / 'profile'}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._http = aiohttp.ClientSession()
        try:
            await asyncio.wait_for(self._attach(), START_SECONDS_MAX)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _attach(self) -> None:
        active = self.directory / "profile" / "DevToolsActivePort"
        while not active.exists() or len(active.read_text().split()) < 2:
            assert self._process.poll() is None, "the browser ended at its start"
            await asyncio.sleep(0.05)
        port = active.read_text().split()[0]
        async with self._http.get(f"http://127.0.0.1:{port}/json/list") as answer:
            targets = json.loads(await answer.text())
        (target,) = [target for target in targets if target["type"] == "page"]
        self._socket = await self._http.ws_connect(
            target["webSocketDebuggerUrl"], max_msg_size=1 << 28
        )
        self._reader = asyncio.get_running_loop().create_task(self._read())
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        await self.send("Emulation.setScrollbarsHidden", hidden=True)
        await self.resize(*self.size)

    async def __aexit__(self, *_: object) -> None:
        if hasattr(self, "_reader"):
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            await self._socket.close()
        await self._http.close()
        self._process.kill()
        self._process.wait()

    async def _read(self) -> None:
        async for message in self._socket:
            body = json.loads(message.data)
            if "id" in body:
                self._answers.pop(body["id"]).set_result(body)
            elif body["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(body["params"]["exceptionDetails"]))
            elif body["method"] == "Log.entryAdded":
                entry = body["params"]["entry"]
                if entry["level"] == "error":
                    self.problems.append(f"{entry['text']} {entry.get('url', '')}")

    async def send(self, method: str, **params: Any) -> Any:
        self._number += 1
        waiting = asyncio.get_running_loop().create_future()
        self._answers[self._number] = waiting
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        body = await asyncio.wait_for(waiting, ANSWER_SECONDS_MAX)
        assert "error" not in body, (method, body)
        return body["result"]

    async def resize(self, width: int, height: int) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def scheme(self, name: str) -> None:
        """Dark or light, as the person's system would say."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        await self.send("Emulation.setEmulatedMedia", features=features)

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """The JSON value of an expression in the page."""
        answer = await self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str, seconds_max: float = 20.0) -> Any:
        """The first true value of an expression."""
        found = None
        for _ in range(int(seconds_max / 0.1)):
            found = await self.value(expression)
            if found:
                return found
            await asyncio.sleep(0.1)
        text = await self.value("document.body ? document.body.innerText.slice(0, 600) : ''")
        raise AssertionError(f"{expression} stayed {found!r}; problems {self.problems}; {text}")

    async def submit(self, selector: str, text: str) -> None:
        """Type into an input and send its form, as a person does."""
        await self.value(f"document.querySelector({json.dumps(selector)}).select()")
        await self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                text="\r" if kind == "keyDown" else "",
                windowsVirtualKeyCode=13,
            )

    async def screenshot(self, path: Path) -> None:
        shot = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(shot["data"]))
