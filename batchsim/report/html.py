"""Pieces of a page for the browser: everything in one file, plotly.js included, and nothing fetched from anywhere."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping

import plotly.graph_objects as go
import yaml
from plotly.offline import get_plotlyjs

from batchsim.report.style import SCRIPT, STYLE

# The browser itself refuses to fetch: the page has what it needs.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def document(title: str, body: Iterable[str], plots: dict[str, go.Figure], style: str = "", script: str = "") -> str:
    """A whole page; `plots` are drawn into the elements that `plot` makes; `style` and `script` are the page's own."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escaped(title)} - BatchSim</title>",
            f"<style>{STYLE}{style}</style>",
            f"<script>{get_plotlyjs()}</script>",
            "</head><body><main>",
            *body,
            "</main>",
            embedded("plots", {name: figure.to_plotly_json() for name, figure in plots.items()}),
            f"<script>{SCRIPT}{script}</script>",
            "</body></html>\n",
        ]
    )


def header(title: str, headline: str, causes: Iterable[str]) -> str:
    """What the page is about: its title, what came out in a sentence, and why."""
    return (
        f'<header><p class="kicker">BatchSim report</p><h1>{escaped(title)}</h1>\n'
        f'<p class="headline">{escaped(headline)}</p>\n<ul class="causes">{items(causes)}</ul></header>'
    )


def escaped(value: object) -> str:
    return html.escape(str(value))


def items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{escaped(each)}</li>" for each in texts)


def section(title: str, note: str, body: str) -> str:
    note = f'<p class="note">{escaped(note)}</p>' if note else ""
    return f"<section><h2>{escaped(title)}</h2>{note}{body}</section>"


def plot(name: str) -> str:
    return f'<div class="plot" id="{name}"></div>'


def definitions(texts: Mapping[str, str]) -> str:
    return "<dl class='definitions'>{}</dl>".format(
        "".join(f"<dt><code>{escaped(key)}</code></dt><dd>{escaped(meaning)}</dd>" for key, meaning in texts.items())
    )


def as_yaml(value: object) -> str:
    plain = json.loads(json.dumps(value, default=str))
    return f"<pre>{escaped(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).rstrip())}</pre>"


def embedded(name: str, value: object) -> str:
    """`value` as JSON in the element `name`; `<` is escaped, so that no text in it can end the element."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{written}</script>'
