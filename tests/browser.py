"""A headless Chromium, driven by WebDriver (https://www.w3.org/TR/webdriver2/) with the standard library alone."""

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = "no chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """One session of a running driver."""

    def __init__(self, address: str) -> None:
        self.address = address

    def send(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def emulate(self, *, width: int, dark: bool) -> None:
        """A screen of this width, and what the reader prefers."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        for command, parameters in (
            ("Emulation.setDeviceMetricsOverride", metrics),
            ("Emulation.setEmulatedMedia", {"features": scheme}),
        ):
            self.send("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, path: Path) -> None:
        self.send("POST", "/url", url=path.resolve().as_uri())

    def run(self, script: str) -> Any:
        """What the function body `script` returns on the page."""
        return self.send("POST", "/execute/sync", script=script, args=[])

    def press(self, key: str) -> None:
        """A key on the keyboard, in WebDriver's code."""
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.send("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def screenshot(self) -> str:
        """PNG, base64."""
        return str(self.send("GET", "/screenshot"))


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A fresh browser whose profile lies in the folder `profile`; all of it ends with the block."""
    driver = subprocess.Popen([str(CHROMEDRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        port = int(line.rstrip(". \n").rpartition(" ")[2])
        root = Browser(f"http://127.0.0.1:{port}")
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        session = root.send("POST", "/session", capabilities=wanted)["sessionId"]
        browser = Browser(f"{root.address}/session/{session}")
        try:
            yield browser
        finally:
            browser.send("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=30)
        if driver.stdout is not None:
            driver.stdout.close()
