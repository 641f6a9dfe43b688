"""Controls a page in headless Chromium over its debugging pipe, by JSON messages that end in a zero byte.

Chromium comes from apt; this needs no driver and no Python package. The protocol is the Chrome DevTools Protocol,
https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35}
KEYS |= {"Enter": 13, "Escape": 27, "Tab": 9}


class Browser:
    """One tab. `problems` has what the page logged as warning or error, and `requests` what it asked for."""

    def __init__(self, width=1000, height=1000):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        # Chromium reads file descriptor 3 and writes 4; above them, neither copy overwrites the other's source.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        for fd in (theirs_in, theirs_out):
            os.close(fd)
        window = [f"--user-data-dir={self.profile.name}", f"--window-size={width},{height}"]
        redirected = ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]} 2>/dev/null', "bash"]
        command = [*redirected, CHROMIUM, *FLAGS, *window, "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=high, start_new_session=True)
        for fd in high:
            os.close(fd)
        self.buffer, self.number, self.session = b"", 0, None
        self.problems, self.requests, self.loaded = [], [], False
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.out)  # at its end Chromium ends
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the group of this browser alone
            self.process.wait()
        os.close(self.into)
        self.profile.cleanup()

    def send(self, method, **params):
        """Calls a method of the protocol; returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self.number:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]

    def _receive(self, timeout=120):
        while b"\0" not in self.buffer:
            assert select.select([self.into], [], [], timeout)[0], "Chromium does not answer"
            data = os.read(self.into, 1 << 20)
            assert data, "Chromium has ended"
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(message)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def open(self, url, ready):
        """Goes to a page, and waits until the JavaScript expression `ready` is true."""
        self.send("Page.navigate", url=url)
        end = time.monotonic() + 120
        while not self.evaluate(f"Boolean({ready})"):
            assert time.monotonic() < end, (f"{ready} is still false", self.problems)
            time.sleep(0.05)

    def evaluate(self, expression):
        """Returns the value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key):
        """Presses a key of KEYS."""
        key = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key["key"] == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **key)

    def hover(self, selector):
        """Moves the mouse from outside into the element that a JavaScript expression returns; returns where it is."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
        box = self.evaluate(f"(({selector}).scrollIntoView(), ({selector}).getBoundingClientRect().toJSON())")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        return place

    def click(self, selector):
        """Clicks on the element that a JavaScript expression returns."""
        place = self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def colours(self, scheme):
        """Makes the page dark or light."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def names(self):
        """Returns the (role, name) pairs that a screen reader is given."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]

    def screenshot(self):
        """Returns the whole page as a PNG."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(found["data"])
