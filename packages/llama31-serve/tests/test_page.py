"""The page at /, in a real browser: chat, streaming, stop, parameters, facts; and what it may load (nothing)."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from llama31_serve.server.listener import Security
from llama31_serve.server.token_auth import Token

Serve = Any
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
HTTP = {"http_port": 0, "model_name": "echo"}


class Browser:
    """One tab, over the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.requested: list[str] = []
        self.complaints: list[str] = []

    async def call(self, method: str, **params: object) -> Any:
        """The result of a method."""
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(20):
            while True:
                message = await self._socket.receive_json()
                if message.get("method") == "Network.requestWillBeSent":
                    self.requested.append(message["params"]["request"]["url"])
                elif message.get("method") == "Runtime.exceptionThrown" or _is_bad(message):
                    self.complaints.append(json.dumps(message["params"]))
                if message.get("id") == number:
                    assert "error" not in message, message
                    return message["result"]

    async def run(self, script: str) -> Any:
        """The value of an expression."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait for an expression to be true."""
        async with asyncio.timeout(20):
            while not await self.run(script):
                await asyncio.sleep(0.02)

    async def ask(self, text: str) -> None:
        """Type and press Enter."""
        await self.run("document.getElementById('question').focus()")
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)

    async def answer(self) -> str:
        """Text of the last answer."""
        return str(await self.run("[...document.querySelectorAll('.assistant .text')].at(-1).textContent"))

    async def facts(self) -> str:
        """The line below it."""
        return str(await self.run("[...document.querySelectorAll('.facts')].at(-1).textContent"))


def _is_bad(message: Any) -> bool:
    return message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] in ("warning", "error")


@asynccontextmanager
async def browser(url: str) -> AsyncIterator[Browser]:
    """A tab that shows a page."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        flags += ["--disable-quic", "--disable-background-networking"]  # it is to speak to the server alone
        nothing = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            str(CHROMIUM), *flags, f"--user-data-dir={profile}", "about:blank", stdout=nothing, stderr=nothing
        )
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            async with asyncio.timeout(30):
                while not port_file.exists() or not port_file.read_text().strip():
                    await asyncio.sleep(0.05)
            port = port_file.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as listed:
                    [tab] = [one for one in await listed.json() if one["type"] == "page"]
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=1 << 26) as socket:
                    shown = Browser(socket)
                    for domain in ("Page", "Network", "Runtime", "Log"):
                        await shown.call(f"{domain}.enable")
                    await shown.call("Page.navigate", url=url)
                    yield shown
        finally:
            process.terminate()
            await process.wait()


@browser_only
async def test_chat_in_the_browser(serve: Serve, say: Any) -> None:
    text = "Paris is `the` capital. <b>Bold</b>?\n```py\nprint(1)\n```\nDone."
    async with serve(engine=say(text, step_s=0.002), **HTTP) as running:
        url = running.server.http.business.url
        async with browser(url) as tab:
            await tab.until("document.getElementById('state')?.className == 'state good'")
            assert "echo · context 4,096" in await tab.run("document.getElementById('model').textContent")
            await tab.ask("Where?")
            await tab.until("document.getElementById('go').textContent == 'Send' && messages.length == 2")
            assert await tab.answer() == "Paris is the capital. <b>Bold</b>?\nprint(1)\nDone."  # HTML stays text
            assert await tab.run("document.querySelector('.assistant pre').textContent") == "print(1)"
            facts = await tab.facts()
            assert re.match(rf"{len(text)} tokens[\d.]+ tokens/sfirst after [\d.]+ sprompt \d+", facts), facts
            await tab.ask("And now?")
            await tab.until("messages.length == 4")
            assert f"{2 * len(text)} tokens generated" in await tab.run("document.getElementById('totals').textContent")
            await tab.run("document.getElementById('fresh').click()")
            assert await tab.run("messages.length == 0 && !!document.querySelector('.empty')")
            assert all(one.startswith((url, "data:")) for one in tab.requested), tab.requested
            assert not tab.complaints


@browser_only
async def test_parameters_and_stop_button(serve: Serve, say: Any) -> None:
    async with (
        serve(engine=say("a" * 1500, step_s=0.005), **HTTP) as running,
        browser(running.server.http.business.url) as tab,
    ):
        await tab.until("document.getElementById('state')?.className == 'state good'")
        await tab.run("document.getElementById('p-max_tokens').value = 5")
        await tab.ask("x")
        await tab.until("messages.length == 2")
        assert await tab.answer() == "aaaaa"
        assert "reached the most tokens" in await tab.facts()
        await tab.run("document.getElementById('p-max_tokens').value = 1500")
        await tab.ask("y")
        await tab.until("[...document.querySelectorAll('.assistant .text')].at(-1).textContent.length > 10")
        assert running.engine.num_requests == 1
        assert await tab.run("document.getElementById('go').textContent") == "Stop"
        await tab.run("document.getElementById('go').click()")
        await running.until(lambda: running.engine.num_requests == 0)
        await tab.until("document.getElementById('go').textContent == 'Send'")
        assert "stopped" in await tab.facts()
        assert 10 < len(await tab.answer()) < 1500
        await tab.run("document.getElementById('p-temperature').value = 0")
        await tab.run("document.getElementById('p-max_tokens').value = 900000")
        await tab.ask("z")
        await tab.until("!!document.querySelector('.problem')")
        assert "max_tokens" in await tab.run("document.querySelector('.problem').textContent")


@browser_only
async def test_token(serve: Serve, say: Any) -> None:
    security = Security(tokens=(Token(b"secret"),))
    async with (
        serve(engine=say("ok"), security=security, client_options={"token": "secret"}, **HTTP) as running,
        browser(running.server.http.business.url) as tab,
    ):
        await tab.until("document.getElementById('state')?.className == 'state bad'")
        assert "bearer token" in await tab.run("document.getElementById('model').textContent")
        await tab.run("document.getElementById('p-token').value = 'secret'; connect()")
        await tab.ask("x")
        await tab.until("messages.length == 2")
        assert await tab.answer() == "ok"


async def test_the_page_names_no_other_place(serve: Serve) -> None:
    async with serve(**HTTP) as running, httpx.AsyncClient() as client:
        response = await client.get(running.server.http.business.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    addresses = set(re.findall(r"https?://[^'\"\s)]+", response.text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
