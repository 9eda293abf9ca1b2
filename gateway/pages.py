"""Standalone HTML: one file that needs nothing else and fetches nothing, in which what others wrote can do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, every one escaped; without a head if that is empty."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{f'<tr>{top}</tr>' if head else ''}{''.join(lines)}</table>"


def page(title: str, body: Iterable[str], *, script: str = "") -> str:
    """A whole document. `title` is escaped; what is in `body` is HTML, and `script` is a script of ours."""
    head = _HEAD.replace("TITLE", escape(title))
    scripts = f"<script>{script}</script>\n" if script else ""
    content = "\n".join(body)
    return f"{head}{scripts}</head>\n<body>\n{content}\n</body>\n</html>\n"


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>TITLE</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
td { white-space: pre-wrap; }
th { white-space: nowrap; }
</style>
"""
