"""What people look at after a run: run.json, the model card, and report.html.

Pages and cards are pure functions of plain data (manifest, metrics, recipe text, samples): nothing is read, nothing is
asked of the network, and every string that a run brings along is escaped by construction (markup.py).

    manifest.py   what exactly was run             facts.py    manifest and metrics -> named values, for tables
    layers.py     spectrum by layer                quantities.py   a row of a table has one unit
    card.py       README.md of an adapter          figures.py  which plots a page shows
    page.py       report.html, one run or several  svg.py, axis.py, series.py   how a plot is drawn
"""
