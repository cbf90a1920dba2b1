"""HTML of self-contained pages: style, tables and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from hydrazero.shards.files import write_text
from hydrazero.shards.text.foreign_text import for_html

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { margin: 0 auto; max-width: 1080px; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p.facts { color: #666; margin: .1rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th { font-weight: 600; color: #555; font-size: .85rem; vertical-align: bottom; white-space: normal; }
td:first-child, th:first-child, td.text, th.text { text-align: left; }
td.best { font-weight: 700; background: #eef6ee; }
td.text { white-space: normal; overflow-wrap: anywhere; } td.text:first-child { white-space: nowrap; }
img { max-width: 100%; height: auto; display: block; }
@media (max-width: 700px) { .wide img { max-width: none; } }
.side { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.large img { max-width: none; }
pre { font-size: .8rem; background: #f6f6f6; padding: .8rem; overflow-x: auto; } summary { cursor: pointer; }
details.run > summary { font-size: 1.3rem; font-weight: 600; margin: 1.2rem 0; }
"""

PIXELS = 100
"""Pixels on the page per inch of a figure."""
DOTS = 130
"""Pixels in the file per inch of a figure; more than on the page, for screens with a high resolution."""
COLOURS = 256
"""Number of colours of a picture, which reduces its size to a third."""
WIDE = 10.9
"""Width in inches above which a figure is scrolled instead of shrunk."""


def page(title: str, parts: Sequence[str]) -> str:
    """Return a complete HTML document."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{for_html(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write_page(title: str, parts: Sequence[str], out: Path) -> Path:
    """Write a page to a file, making its folder, and return its path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(title, parts), shared=True)
    return out


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    texts: Collection[int] = (0,),
    best: Collection[tuple[int, int]] = (),
) -> str:
    """Return a table; the columns `texts` are aligned to the left, and the cells `best` (row, column) are marked."""

    def kinds(row: int | None, column: int) -> str:
        names = [name for name, holds in (("text", column in texts), ("best", (row, column) in best)) if holds]
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(
        f"<th{kinds(None, column)}>{for_html(text).replace(chr(10), '<br>')}</th>"
        for column, text in enumerate(headings)
    )
    body = "".join(
        f"<tr>{''.join(f'<td{kinds(number, column)}>{for_html(cell)}</td>' for column, cell in enumerate(row))}</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def picture(figure: Figure, alternative: str) -> str:
    """Return an image with the figure embedded and an alternative text; one too wide for the page can be scrolled."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS)
    Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    width = figure.get_figwidth()
    kind = "scroll large" if width > WIDE else "scroll wide"
    return (
        f'<div class="{kind}"><img alt="{for_html(alternative)}" width="{round(PIXELS * width)}" '
        f'src="data:image/png;base64,{data}"></div>'
    )


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{for_html(text)}</p>"


def facts(text: str) -> str:
    """Return a line in grey."""
    return f'<p class="facts">{for_html(text)}</p>'
