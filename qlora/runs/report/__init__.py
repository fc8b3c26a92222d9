"""The report of a run: run.json, the model card, and report.html.

Pages and model cards are pure functions of plain data (manifest, metrics, recipe text, samples): they read no file and
make no request, and every string from a run is escaped by construction (markup.py).

    manifest.py           run.json                 facts.py          manifest and metrics as named values
    model_card.py         README.md of a run       quantities.py     one unit for each row of a table
    export_model_card.py  README.md of an export   figures.py        the plots of a page
    page.py               report.html              spectrum_page.py  the spectrum by layer
    html_tables.py        the tables of a page     svg.py, axis.py, series.py   how a plot is drawn
"""
