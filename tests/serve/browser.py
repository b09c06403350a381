"""A headless Chromium over the DevTools protocol, which it speaks through a pair of pipes: JSON, a zero byte after each."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 30  # seconds that a page has for what a test waits for
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
# What goes wrong on a page without a test's noticing: errors that nobody caught, and what its security policy refused.
_WATCH = """
    window.faults = [];
    addEventListener("error", (event) => faults.push(event.message));
    addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
    addEventListener("securitypolicyviolation", (event) => faults.push(`${event.violatedDirective}: ${event.blockedURI}`));
"""
_KEYS = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowRight": 39, "Tab": 9, " ": 32, "?": 191}


class Browser:
    def __init__(self, profile: Path):
        (read_commands, self._commands), (self._replies, write_replies) = os.pipe(), os.pipe()
        # The shell gives the pipes the numbers that Chromium looks for, whatever they are here.
        pipes = f"3</dev/fd/{read_commands} 4>/dev/fd/{write_replies}"
        command = [str(CHROMIUM), *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", f'exec "$0" "$@" {pipes}', *command],
            pass_fds=(read_commands, write_replies), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_commands)
        os.close(write_replies)
        self._numbers = itertools.count(1)
        self._rest = b""
        self._tabs: dict[str, Tab] = {}  # by the context that each is alone in

    def close(self) -> None:
        # Its own close takes its children along; the group is for one that no longer listens.
        os.write(self._commands, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._commands)
        os.close(self._replies)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        watchdog = threading.Timer(2 * PATIENCE, self._process.kill)  # its end ends the reading too
        watchdog.start()
        try:
            while True:
                reply = self._read()
                if reply.get("id") == number:
                    assert "error" not in reply, f"{method}: {reply['error']['message']}"
                    return reply["result"]
        finally:
            watchdog.cancel()

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._replies, 1 << 20)
            assert data, "Chromium has ended"
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def close_tabs(self) -> list[str]:
        """Closes all tabs and tells what went wrong on their pages."""
        faults = [fault for tab in self._tabs.values() for fault in tab.js("faults")]
        for context in self._tabs:
            self.call("Target.disposeBrowserContext", browserContextId=context)
        self._tabs.clear()
        return faults

    def open(self, url: str, *, width: int = 1100, height: int = 760, language: str = "en", phone: bool = False) -> Tab:
        """A new tab with a storage of its own, once its document is loaded."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[context] = Tab(self, session)
        tab.call("Page.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)
        tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        tab.call("Network.setUserAgentOverride", userAgent="Chromium", acceptLanguage=language)
        tab.resize(width, height, phone=phone)
        tab.call("Page.navigate", url=url)
        tab.wait("location.href !== 'about:blank' && document.readyState === 'complete'")
        return tab


class Tab:
    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def js(self, expression: str) -> Any:
        """The value of an expression, or what its promise comes to."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]["exception"].get("description")
        return done["result"].get("value")

    def wait(self, condition: str) -> Any:
        """The value of an expression as soon as it is truthy; looked at with every frame, in the page."""
        program = f"""new Promise((resolve, reject) => {{
            const end = performance.now() + {PATIENCE * 1000};
            const look = () => {{
                const value = {condition};
                if (value) resolve(value);
                else if (performance.now() > end) reject(new Error("waited in vain"));
                else requestAnimationFrame(look);
            }};
            look();
        }})"""
        for attempts_left in (2, 1, 0):  # a navigation takes the page away from under the promise
            try:
                return self.js(program)
            except AssertionError as error:
                assert attempts_left and any(text in str(error) for text in ("context", "navigat")), (
                    f"{condition}: {error}\n{self.js('document.body?.innerText')}"
                )
        return None

    def text(self, selector: str) -> str:
        """The text of the elements as it is shown, a line for each."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.innerText).join('\\n')")

    def click(self, selector: str) -> None:
        self.wait(f"document.querySelector({json.dumps(selector)})?.checkVisibility()")
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def fill(self, selector: str, text: str) -> None:
        """Puts a text into a field and leaves it, as a reader would."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"{field}?.checkVisibility()")
        self.js(f"{field}.focus(); {field}.select?.()")
        assert self.js(f"document.activeElement === {field}"), f"{selector} takes no focus"
        self.write(text)
        self.js(f"{field}.dispatchEvent(new Event('change'))")

    def write(self, text: str) -> None:
        """Text into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def key(self, key: str, *, shift: bool = False) -> None:
        typed = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        common = {"key": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def resize(self, width: int, height: int, *, phone: bool = False, scale: float = 1) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def prefer(self, **features: str) -> None:
        """Media features, such as prefer(**{"prefers-color-scheme": "dark"})."""
        values = [{"name": name, "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=values)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
