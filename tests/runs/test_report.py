"""report.html: current while the run goes on, a row one unit, every axis its own, and nothing asked of any network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_rows

from qlora.runs.report.layers import place_of
from qlora.runs.report.page import RunData, report_page
from qlora.runs.report.quantities import Duration, Energy, Size, alike
from qlora.runs.train import train
from qlora.training import loop, run_log

pytestmark = pytest.mark.xdist_group("report")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
VOID = {"meta", "br", "hr", "col"}


@pytest.fixture(scope="module")
def finished(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with held-out rows."""
    folder = tmp_path_factory.mktemp("report")
    recipe = recipe_of(zoo("llama"), write_rows(folder / "rows.jsonl", 24), folder / "run", "data.eval_fraction=0.25",
                       "train.eval_every=2")  # fmt: skip
    run(recipe)
    return folder / "run"


class Reader(HTMLParser):
    """Every element of a page with its attributes and its text, and whether the tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name


def test_a_page_names_no_address_and_forbids_every_request(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    names = {name for name, _ in Reader(page).found}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    for name, attributes in Reader(page).found:
        assert not {"src", "href", "xlink:href", "srcset", "action", "data"} & attributes.keys(), name
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style and "default-src &#x27;none&#x27;" in page


def test_every_plot_says_what_its_axes_show_and_in_what_unit(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    plots = re.findall(r'class="figure (?:plot|bars)"[^>]*aria-label="([^"]+)"', page)
    units = re.findall(r'class="unit[^"]*">([^<]+)<', page)
    assert len(plots) >= 5  # loss, rate, throughput, gradient, memory
    curves, bars = len(re.findall('class="figure plot"', page)), len(re.findall('class="figure bars"', page))
    assert len(units) == 2 * curves + bars
    assert {"optimizer step", "nats per token", "tokens/s"} <= {*units} and re.search("[KMG]iB", " ".join(units))


def test_the_spectrum_has_a_cell_for_every_adapted_matrix(finished: Path) -> None:
    manifest = json.loads((finished / "run.json").read_text())
    page = (finished / "report.html").read_text()
    assert {*manifest["spectrum"]} == {*manifest["adapter"]["paths"]}
    assert len(re.findall(r"<td title=[^>]*--used", page)) == len(manifest["spectrum"])
    inspected = qlora("inspect", finished, "--json").json
    for layer in inspected["layers"]:
        assert manifest["spectrum"][layer["name"]]["energy_90_rank"] == layer["energy_90_rank"]
    assert place_of("model.layers.3.self_attn.q_proj") == ("3", "q_proj") and place_of("lm_head") == ("-", "lm_head")


def test_the_page_is_there_and_current_while_the_run_goes_on(zoo: Any, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[str] = []
    taken, page = loop._step, tmp_path / "run" / "report.html"

    def step(job: Any, number: int) -> Any:
        seen.append(page.read_text() if page.exists() else "")
        return taken(job, number)

    monkeypatch.setattr(loop, "_step", step)
    monkeypatch.setattr(run_log, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(run_log, "REDRAW_SHARE", 1e9)
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    recipe = recipe_of(zoo("llama"), rows, page.parent, "data.eval_fraction=0.25")
    train(recipe, quiet=True)
    assert "not finished: step 0 of 6" in seen[0] and "not finished: step 5 of 6" in seen[5]
    assert all('http-equiv="refresh"' in each for each in seen)
    assert "not finished" not in page.read_text() and 'http-equiv="refresh"' not in page.read_text()


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([Size(512 * 2**20), Size(3 * 2**30)], ["0.50 GiB", "3.00 GiB"]),
        ([Size(100), Size(900)], ["100.00 bytes", "900.00 bytes"]),
        ([Duration(30), Duration(7200)], ["0.01 h", "2.00 h"]),
        ([Energy(3600), "", Energy(7200)], ["1.00 Wh", "", "2.00 Wh"]),
        ([Duration(75), ""], ["1 min 15 s", ""]),
        (["nf4", "dense"], ["nf4", "dense"]),
    ],
)
def test_a_row_of_a_table_has_one_unit(values: list, shown: list) -> None:
    assert alike(values) == shown


def test_runs_of_different_sizes_are_compared_in_one_unit() -> None:
    big, small = (
        RunData(name, {"seconds": seconds, "memory": {"peak_bytes": peak}, "energy_joules": seconds * 100})
        for name, seconds, peak in (("big", 7200.0, 3 * 2**30), ("small", 30.0, 200 * 2**20))
    )
    page = report_page([big, small])
    row = re.search(r"peak memory, measured</th>(.*?)</tr>", page)
    assert row and re.findall(r"<td>([^<]+)</td>", row[1]) == ["3.00 GiB", "0.20 GiB"]
    row = re.search(r"energy of the cards</th>(.*?)</tr>", page)
    assert row and [value.split()[1] for value in re.findall(r"<td>([^<]+)</td>", row[1])] == ["Wh", "Wh"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page was not opened in a browser")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_the_page_fits_and_no_request_leaves_it(width: int, finished: Path, tmp_path: Path) -> None:
    requests, picture = tmp_path / "net.json", tmp_path / "page.png"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--log-net-log={requests}",
        f"--window-size={width},2400", f"--screenshot={picture}", f"--user-data-dir={tmp_path / 'profile'}",
        "--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"file://{finished / 'report.html'}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 10_000
    asked = re.findall(r'"url":"(https?://[^"]+)"', requests.read_text())
    assert [url for url in asked if "google" not in url and "gvt1" not in url] == []  # the browser's own
