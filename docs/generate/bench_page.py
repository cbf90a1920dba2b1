"""Put the rows of runs/bench.json into the tables of docs/benchmarks.md, each where its name stands.

    python docs/generate/bench_page.py runs/bench.json docs/benchmarks.md

Rows that the page does not have, and rows of the page that were not measured, are listed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

LINE = re.compile(r"^(?P<text>\| .*<br>`(?P<name>\w+)` \|).*$", flags=re.MULTILINE)


def shown(value: float) -> str:
    """Return a number as the table of `make bench` prints it."""
    return f"{value:,.1f}" if value >= 20 else f"{value:.3f}"


def cells(row: dict[str, Any]) -> str:
    """Return the cells of a row behind its name."""
    found = [shown(row["value"]), row["unit"]]
    if row["peer_value"] is not None:
        found += [f"{row['peer_value']:,.1f}", f"{row['ratio']:.2f}"]
    return "".join(f" {cell} |" for cell in found)


def updated(page: str, rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return the page with the values of rows, and the names that only one of both has."""
    by_name = {row["name"]: row for row in rows}
    names = {match["name"] for match in LINE.finditer(page)}
    page = LINE.sub(lambda m: m["text"] + cells(by_name[m["name"]]) if m["name"] in by_name else m[0], page)
    return page, sorted(names ^ set(by_name))


def main() -> None:
    """Update the page."""
    source, path = Path(sys.argv[1]), Path(sys.argv[2])
    page, missing = updated(path.read_text(encoding="utf-8"), json.loads(source.read_text(encoding="utf-8")))
    path.write_text(page, encoding="utf-8")
    sys.stdout.write("".join(f"only on one side: {name}\n" for name in missing))


if __name__ == "__main__":
    main()
