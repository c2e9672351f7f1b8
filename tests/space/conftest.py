"""The Space in a process of its own, against the loopback Hub, and a real browser before it."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces_app"
CHROMIUM = "/usr/bin/chromium"
PATIENCE = 30_000  # milliseconds
sys.path.insert(0, str(SPACE))


@dataclass
class App:
    """A running Space: its address, the process, and how long that took to answer."""

    url: str
    process: subprocess.Popen
    up_after: float


@pytest.fixture(scope="session")
def start_app(tmp_path_factory):
    """A function that starts a Space with more environment variables and folders, and ends all of them at last."""
    started = []

    def start(*folders, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        home = tmp_path_factory.mktemp("space")
        told = {
            "HF_HOME": str(home), "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SYSTEM": "spaces",
            "SPACE_ID": "tester/space", "OAUTH_CLIENT_ID": "space", "OAUTH_CLIENT_SECRET": "secret",
            "OAUTH_SCOPES": "openid profile write-discussions", "OPENID_PROVIDER_URL": os.environ["HF_ENDPOINT"],
            "GRADIO_SERVER_NAME": "127.0.0.1", **environment,
        }  # fmt: skip
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(SPACE / "app.py"), *map(str, folders)],
            env={**os.environ, **told},
            cwd=home,
            stdout=(home / "log").open("w"),
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        while time.perf_counter() - begun < 60:
            try:
                urlopen(f"{url}/config", timeout=1).close()
                return App(url, process, time.perf_counter() - begun)
            except OSError:
                assert process.poll() is None, (home / "log").read_text()
                time.sleep(0.1)
        raise AssertionError((home / "log").read_text())

    yield start
    for process in started:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def app(start_app, minilm):
    """One Space for all tests, with MiniLM as a local folder."""
    return start_app(minilm)


@pytest.fixture(scope="session")
def chromium():
    """Debian's chromium, headless; without it these tests are skipped."""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium (as root, .ci/run does it)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visitor:
    """A page of one visitor, and what went wrong on it."""

    page: object
    url: str
    complaints: list[str] = field(default_factory=list)

    def open(self, query=""):
        """Go there and wait until the model that is asked for is shown, or refused."""
        self.page.goto(f"{self.url}/{query}")
        self.page.wait_for_selector("#analyze", timeout=PATIENCE)
        return self

    def settled(self):
        """The status, once it tells the end of an analysis."""
        self.page.wait_for_function(
            "() => /ready after|lmd-bad/.test(document.querySelector('#status')?.innerHTML ?? '')"
            " && !document.querySelector('#status [data-old]')",
            timeout=PATIENCE,
        )
        return self.page.inner_text("#status")

    def ask(self, model, revision=""):
        """Type a model's name and press Analyze."""
        box = self.page.get_by_label("Model", exact=True)
        box.fill(model)
        box.press("Enter")
        if revision:
            self.page.get_by_label("Revision", exact=True).fill(revision)
        self.page.evaluate("document.querySelector('#status .lmd-status').dataset.old = 1")
        self.page.click("#analyze")

    def tab(self, name):
        """Open a tab; where they do not fit, it is in the menu of the others."""
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():
            self.page.locator(".overflow-menu > button").click()
            tab = self.page.locator(".overflow-dropdown button", has_text=name)
        tab.click()


def complain(visitor, message):
    """Note an error of our own: Gradio's page asks for fonts and for its Space elsewhere, which no test may reach."""
    where = message.location["url"]
    if message.type == "error" and not where.startswith("https://") and message.text != "Space not found":
        visitor.complaints.append(f"{message.text} {where}")


@pytest.fixture
def visit(chromium, app):
    """A function that opens a new visitor's page; at the end no console may have complained."""
    opened = []

    def new(*, width=1280, height=900, scheme="light", url=None, **options):
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True, **options
        )
        visitor = Visitor(context.new_page(), url or app.url)
        visitor.page.set_default_timeout(PATIENCE)
        visitor.page.on("console", partial(complain, visitor))
        visitor.page.on("pageerror", lambda error: visitor.complaints.append(str(error)))
        opened.append((context, visitor))
        return visitor

    yield new
    for context, _ in opened:
        context.close()
    assert [visitor.complaints for _, visitor in opened if visitor.complaints] == []


@pytest.fixture
def model_files():
    """The embedded model's files, to put on the Hub."""
    from lmd_hf.weights.source import EMBEDDED_FOLDER

    return {p.name: p.read_bytes() for p in EMBEDDED_FOLDER.iterdir() if p.is_file()}
