"""report.html: up to date during a run, one unit in each table row, titles on all axes, and no request."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records
from support.training_hooks import before_update

from qlora.runs.report.page import report_page
from qlora.runs.report.quantities import Duration, Energy, Size, in_one_unit
from qlora.runs.report.run_data import RunData
from qlora.runs.report.spectrum_page import UpdateSpectrum, draw_grid, position_of
from qlora.runs.train import train
from qlora.training import run_log

pytestmark = pytest.mark.xdist_group("report")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
VOID = {"meta", "br", "hr", "col"}


@pytest.fixture(scope="module")
def finished(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with held-out examples."""
    folder = tmp_path_factory.mktemp("report")
    data = write_records(folder / "records.jsonl", 24)
    run(recipe_of(zoo("llama"), data, folder / "run", "data.eval_fraction=0.25", "train.eval_every=2"))
    return folder / "run"


class Reader(HTMLParser):
    """Every element of a page with its attributes; fails if the tags are not balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.unclosed: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.unclosed

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.unclosed.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.unclosed.pop() == name


def test_a_page_has_no_address_and_forbids_every_request(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    names = {name for name, _ in Reader(page).elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    for name, attributes in Reader(page).elements:
        assert not {"src", "href", "xlink:href", "srcset", "action", "data"} & attributes.keys(), name
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style and "default-src &#x27;none&#x27;" in page


def test_every_plot_has_titles_with_units_on_its_axes(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    plots = re.findall(r'class="figure (?:plot|bars)[^"]*"[^>]*aria-label="([^"]+)"', page)
    units = re.findall(r'class="unit[^"]*">([^<]+)<', page)
    assert len(plots) >= 5  # loss, rate, throughput, gradient, memory
    curves, bars = len(re.findall('class="figure plot"', page)), len(re.findall('class="figure bars', page))
    assert len(units) == 2 * curves + bars
    assert {"optimizer step", "nats per token", "tokens/s"} <= {*units} and re.search("[KMG]iB", " ".join(units))


def test_the_spectrum_has_a_cell_for_every_adapted_matrix(finished: Path) -> None:
    manifest = json.loads((finished / "run.json").read_text())
    page = (finished / "report.html").read_text()
    assert {*manifest["spectrum"]} == {*manifest["adapter"]["paths"]}
    assert len(re.findall(r'<rect [^>]*class="cell"', page)) == len(manifest["spectrum"])
    inspected = qlora("inspect", finished, "--json").json
    for layer in inspected["layers"]:
        assert manifest["spectrum"][layer["name"]]["energy_90_rank"] == layer["energy_90_rank"]
    assert position_of("model.layers.3.self_attn.q_proj") == ("3", "q_proj")
    assert position_of("lm_head") == ("-", "lm_head")


def test_matrices_of_one_name_in_a_layer_have_a_cell_each() -> None:
    paths = [f"layers.0.mlp.experts.{expert}.up_proj" for expert in range(3)]
    grid = draw_grid([UpdateSpectrum(path, 4, 2, 1.5, 0.1) for path in paths])
    assert sum('class="cell"' in element for element in grid.elements) == 3
    assert all(any(path in element for element in grid.elements) for path in paths)


def test_the_page_is_up_to_date_during_a_run(zoo: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pages: list[str] = []
    page = tmp_path / "run" / "report.html"

    def read_page(update: int) -> None:
        pages.append(page.read_text() if page.exists() else "")

    monkeypatch.setattr(run_log, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(run_log, "REDRAW_SHARE", 1e9)
    data = write_records(tmp_path / "records.jsonl", 24)
    recipe = recipe_of(zoo("llama"), data, page.parent, "data.eval_fraction=0.25")
    with before_update(read_page):
        train(recipe, quiet=True)
    assert "not finished: step 0 of 6" in pages[0] and "not finished: step 5 of 6" in pages[5]
    assert all('http-equiv="refresh"' in text for text in pages)
    assert "not finished" not in page.read_text() and 'http-equiv="refresh"' not in page.read_text()


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([Size(512 * 2**20), Size(3 * 2**30)], ["0.50 GiB", "3.00 GiB"]),
        ([Size(100), Size(900)], ["100.00 bytes", "900.00 bytes"]),
        ([Duration(30), Duration(7200)], ["0.01 h", "2.00 h"]),
        ([Energy(3600), "", Energy(7200)], ["1.00 Wh", "", "2.00 Wh"]),
        ([Duration(75), ""], ["1 min 15 s", ""]),
        (["nf4", "dense"], ["nf4", "dense"]),
    ],
)
def test_a_row_of_a_table_has_one_unit(values: list, texts: list) -> None:
    assert in_one_unit(values) == texts


def test_runs_of_different_sizes_are_compared_in_one_unit() -> None:
    big, small = (
        RunData(name, {"seconds": seconds, "memory": {"peak_bytes": peak}, "energy_joules": seconds * 100})
        for name, seconds, peak in (("big", 7200.0, 3 * 2**30), ("small", 30.0, 200 * 2**20))
    )
    page = report_page([big, small])
    row = re.search(r"peak memory, measured</th>(.*?)</tr>", page)
    assert row and re.findall(r"<td>([^<]+)</td>", row[1]) == ["3.00 GiB", "0.20 GiB"]
    row = re.search(r"energy of all GPUs</th>(.*?)</tr>", page)
    assert row and [value.split()[1] for value in re.findall(r"<td>([^<]+)</td>", row[1])] == ["Wh", "Wh"]


@pytest.mark.sample(of=4)
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
    urls = re.findall(r'"url":"(https?://[^"]+)"', requests.read_text())
    assert [url for url in urls if "google" not in url and "gvt1" not in url] == []  # the browser's own requests
