"""An HTML page in one file without links: its frame, the styles that all pages have, text made harmless."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from kp_runtime.files import write_file

__all__ = ["clean", "wide_table", "write_page"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2024; --paper: #fff; --soft: #5b666e; --line: #d8dde1 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ea; --paper: #14181b; --soft: #9aa6ae; --line: #343c42 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem }
p { margin: .3rem 0 } .soft, figcaption { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { vertical-align: bottom; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th[scope=col] { font-weight: 600; color: var(--soft) } th[scope=row] { font-weight: inherit }
:is(th, td):is(:first-child, .text) { text-align: left }
.hash { font: 12px/1.4 ui-monospace, monospace }
figcaption { font-size: 13px; overflow-wrap: anywhere }
"""

_PRINTED = """
@media print { .wide, figure { overflow: visible } th, td { white-space: normal }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact } }
"""


def clean(text: str) -> str:
    """Escaped for HTML and XML; characters that neither may hold become U+FFFD."""
    return escape("".join(c if c in "\t\n" or (c >= " " and not "\ud800" <= c <= "\udfff") else "\ufffd" for c in text))


def wide_table(name: str, rows: str) -> str:
    """A table of ready rows that scrolls sideways where it is too wide, by the keyboard too; the name is read aloud."""
    return f'<div class=wide tabindex=0 role=region aria-label="{clean(name)}"><table>{rows}</table></div>\n'


def write_page(path: Path, title: str, style: str, body: Iterable[str]) -> Path:
    """Writes a page: the title is text, the style goes between the shared ones, the body is HTML of escaped texts."""
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{clean(title)}</title>
<style>{_STYLE}{style}{_PRINTED}</style>
</head>
<body>
{"".join(body)}</body>
</html>
"""
    write_file(path, page)
    return path
