"""The script of an index page: sorts the table by a column and filters its rows. It reads the page and nothing else."""

import base64
import hashlib

SCRIPT = """
"use strict";
const table = document.querySelector("table"), body = table.tBodies[0], rows = [...body.rows];
const filter = document.querySelector("input"), count = document.querySelector("output");
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
function compare(a, b, column, numeric) {
  const [x, y] = [value(a, column), value(b, column)];
  if (x === "" || y === "") return x === y ? 0 : "last";
  return numeric ? x - y : x.localeCompare(y, undefined, {numeric: true});
}
function sort(header) {
  const column = header.cellIndex, numeric = header.hasAttribute("data-numeric");
  const falling = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const order = rows.slice().sort((a, b) => {
    const result = compare(a, b, column, numeric);
    if (result === "last") return value(a, column) === "" ? 1 : -1;
    return falling ? -result : result;
  });
  body.append(...order);
}
function show() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  count.textContent = rows.filter(row => !row.hidden).length + " of " + rows.length + " runs";
}
for (const header of table.tHead.rows[0].cells) {
  const button = header.querySelector("button");
  if (button) button.addEventListener("click", () => sort(header));
}
filter.addEventListener("input", show);
show();
"""

# The browser runs this script and no other, whatever a name or a setting of a run contains.
SCRIPT_SOURCE = f"'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
STYLE = """
body.index main { max-width: none; }
.index input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--base);
  border-radius: 4px; padding: .25rem .6rem; width: min(26rem, 100%); }
.index form { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: baseline; margin: 1.5rem 0 1rem; }
.index label { display: flex; gap: .6rem; align-items: baseline; flex: 0 1 30rem; }
.index output { color: var(--quiet); }
.index th, .index td { white-space: nowrap; padding: .35rem 1.25rem .35rem 0; min-width: 0; text-align: left;
  overflow-wrap: normal; }
.index td.number, .index th[data-numeric] { text-align: right; }
.index thead th { vertical-align: bottom; text-align: left; }
.index thead button { all: unset; cursor: pointer; font-weight: 600; }
.index thead button:focus-visible { outline: 2px solid var(--c0); }
.index thead [aria-sort=ascending] button::after { content: " \\2191"; }
.index thead [aria-sort=descending] button::after { content: " \\2193"; }
.index tbody th { position: sticky; left: 0; background: var(--paper); color: var(--ink); }
.index a { color: var(--c0); }
.spark { width: 120px; height: 24px; display: block; color: var(--c0); }
.spark path { stroke-width: 1.4; }
"""
