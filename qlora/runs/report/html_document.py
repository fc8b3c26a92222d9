"""An HTML document that makes no request: its head with title, policy and style, and its body."""

from qlora.runs.report.markup import Markup, tag

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser refuses every request, whatever a text contains


def html_document(title: str, style: str, body: Markup, script: str | None = None, refresh: int | None = None) -> str:
    """The document's text. `script`: the hash of its script, if it has one. `refresh`: seconds to its next reading."""
    policy = _POLICY if script is None else f"{_POLICY}; script-src {script}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="color-scheme", content="light dark"),
        None if refresh is None else tag("meta", http_equiv="refresh", content=refresh),
        tag("title", f"{title} \u00b7 qlora"),
        tag("style", Markup(style)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"
