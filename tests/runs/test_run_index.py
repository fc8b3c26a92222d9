"""`qlora report FOLDER`: the index page of many runs, its table as HTML and in a browser."""

import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from socket import socket
from typing import Any

import pytest

from qlora.cli.app import run as run_cli
from qlora.runs.run_index import has_runs_below, write_index_page

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")


def write_runs(root: Path, count: int) -> Path:
    """Runs below `root`, some in a folder of their own: ranks and losses differ, the first one has no manifest."""
    for index in range(count):
        folder = root / ("sweep" if index % 3 else "") / f"run{index:02d}"
        (folder / "checkpoint-000002").mkdir(parents=True)
        lines = [{"event": "train", "step": step, "loss": 1 + math.exp(-step) + index / 10} for step in (1, 2, 3)]
        lines.append({"event": "eval", "step": 3, "eval_loss": (index * 7 % count) + 0.5})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "checkpoint-000002" / "run.json").write_text("{}")
        if index:
            (folder / "run.json").write_text(json.dumps({"base": {"name": "<b>base</b>"}, "seconds": 9 + index}))
            (folder / "report.html").write_text("a page")
        (folder / "recipe.yaml").write_text(
            f"model: m\nadapter: {{rank: {2 ** (index % 4)}}}\ntrain: {{output: runs/{index}}}\n"
        )
    return root


def test_the_page_has_a_row_for_each_run_and_only_settings_that_differ(tmp_path: Path) -> None:
    root = write_runs(tmp_path / "runs", 7)
    write_runs(root / ".trash", 1)
    result = write_index_page(root, root / "index.html")
    page = (root / "index.html").read_text()
    assert result["runs"] == ["run00", "run03", "run06", *(f"sweep/run{n:02d}" for n in (1, 2, 4, 5))]
    assert page.count('<tr><th scope="row">') == page.count('class="spark"') == 7
    assert "adapter.rank" in page and "train.output" not in page and ">model<" not in page
    assert 'href="sweep/run01/report.html"' in page and 'href="run00/report.html"' not in page
    assert "<b>base" not in page and "&lt;b&gt;base" in page
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)
    assert 'data-value="0.5"' in page and ">0.5000<" in page  # numbers sort by their value, not by their text
    lines = re.findall(r'<path d="M([^"]+)"', page)
    heights = [[float(point.split()[1]) for point in line.split("L")] for line in lines]
    assert all(line == sorted(line) and line[0] < line[-1] for line in heights)  # a falling loss falls


def test_a_folder_of_runs_gets_an_index_and_a_run_its_own_page(tmp_path: Path) -> None:
    root = write_runs(tmp_path / "runs", 3)
    assert has_runs_below(root) and not has_runs_below(root / "run00") and not has_runs_below(tmp_path / "none")
    assert run_cli(["report", str(root)]) == 0 and (root / "index.html").is_file()
    assert (
        run_cli(["report", str(root / "run00")]) == 0 and "index" not in (root / "run00/report.html").read_text()[:400]
    )
    assert run_cli(["report", str(tmp_path / "none")]) == 2


def test_a_run_that_can_not_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    root = write_runs(tmp_path / "runs", 3)
    (root / "run00" / "metrics.jsonl").write_text("")  # started just now
    (root / "run00" / "recipe.yaml").unlink()
    (root / "sweep" / "run01" / "run.json").write_text('{"base": [')
    result = write_index_page(root, root / "index.html")
    page = (root / "index.html").read_text()
    assert len(result["runs"]) == 3 and page.count("not finished") == page.count("damaged run.json") == 1
    assert "optim" not in page and ">model<" not in page  # no recipe is no difference


class Browser:
    """A headless browser behind chromedriver (W3C WebDriver)."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        options = {"binary": BROWSER, "args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self._session = self.send("/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def send(self, path: str, body: Any) -> Any:
        """The value of the answer to a command."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def close(self) -> None:
        """End the browser, which would outlive its driver."""
        url = f"{self._url}/session/{self._session}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=60).close()

    def run(self, script: str) -> Any:
        """What a script returns in the page."""
        return self.send(f"/session/{self._session}/execute/sync", {"script": script, "args": []})

    def open(self, page: Path) -> None:
        """Load a page."""
        self.send(f"/session/{self._session}/url", {"url": page.as_uri()})

    def requests(self) -> list[str]:
        """The addresses of all requests."""
        lines = self.send(f"/session/{self._session}/se/log", {"type": "performance"})
        messages = [json.loads(line["message"])["message"] for line in lines]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture
def browser() -> Iterator[Browser]:
    if not DRIVER or not BROWSER:
        pytest.skip("no chromium with chromedriver on this machine")
    with closing(socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.2)
        with closing(Browser(port)) as opened:
            yield opened
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_thirty_runs_sort_and_filter_in_a_browser_without_a_request(tmp_path: Path, browser: Browser) -> None:
    root = write_runs(tmp_path / "runs", 30)
    write_index_page(root, root / "index.html")
    browser.open(root / "index.html")
    column = (
        "const at = [...document.querySelectorAll('thead th')].findIndex(th => th.textContent === 'held-out loss');"
    )
    click = "document.querySelectorAll('thead th')[at].querySelector('button').click();"
    read = "return [...document.querySelectorAll('tbody tr')].map(row => +row.cells[at].textContent);"
    rising, falling = browser.run(column + click + read), browser.run(column + click + read)
    assert rising == sorted(rising) and len(set(rising)) == 30 and falling == rising[::-1]
    shown = browser.run(
        "const field = document.querySelector('input'); field.value = 'sweep run01';"
        "field.dispatchEvent(new Event('input'));"
        "return [[...document.querySelectorAll('tbody tr')].filter(row => !row.hidden).length,"
        "document.querySelector('output').textContent];"
    )
    assert shown == [1, "1 of 30 runs"]
    assert {url for url in browser.requests() if not url.startswith("data:")} == {(root / "index.html").as_uri()}
