"""The page of the search over six encoders: `python -m results.search_page OUT`.

The search is `hydrazero search tests/results/search.space.toml --trials 70 --workers 2`, OUT its `search.out`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results.jobs import PAGES
from results.tables import table

from hydrazero.trainer.report.search_plots import colours_of, front_picture, progress_picture, settings_picture
from hydrazero.trainer.search.importances import importances
from hydrazero.trainer.search.journal import Journal, open_journal
from hydrazero.trainer.search.space import Choices
from hydrazero.trainer.search.trial_rows import (
    STATES,
    TrialRow,
    by_choice,
    front_rows,
    ranked,
    short_names,
    shown_value,
    trial_rows,
)

ENCODER = "model.encoder"
BEST = 5

TEXT = """# A search over six encoders on three tasks

`make sixteen DATA=../shared/data` converts {tasks}, then

```sh
hydrazero search tests/results/search.space.toml --trials {done} --workers 2
python -m results.search_page {out}
```

{trials} trials ({states}) took {minutes:.0f} minutes on 2 CPU cores, each trial on one of them, and had {trained:.0f}
minutes of training steps. They are compared after {rungs} s of these; of {reduction} trials one goes on. Learning rates
are constant after a warm-up, and what is evaluated is the moving average of the weights. Steps are not compiled, which
favours small models with few operations.

Error: validation MAE over that of the trivial predictor (reference energies alone, zero forces), as the geometric mean
over tasks, each of its energies and forces. What is good after {last} s is not all that is good after a day: settings
that learn fast win here.
"""


def numbers(journal: Journal, rows: Sequence[TrialRow]) -> dict[str, Any]:
    """What the page says of the search as a whole."""
    states = Counter(row.state for row in rows)
    ends = [each["at"] for row in rows for each in row.results]
    seconds = [f"{each:.3g}" for each in journal.space.rungs]
    return {
        "tasks": ", ".join(f"`{task}`" for task in journal.trivial),
        "done": states["finished"] + states["pruned"],
        "out": journal.out,
        "trials": len(rows),
        "states": ", ".join(f"{states[name]} {name}" for name in STATES.values() if states[name]),
        "minutes": (max(ends) - min(row.began for row in rows)) / 60,
        "trained": sum(row.results[-1]["seconds"] for row in rows if row.results) / 60,
        "rungs": ", ".join(seconds[:-1]) + f" and {seconds[-1]}",
        "last": seconds[-1],
        "reduction": journal.space.search.reduction,
    }


def encoders(journal: Journal, rows: Sequence[TrialRow]) -> list[str]:
    """A line for each encoder: how often it was tried, and the best of its trials."""
    parameter, rungs = journal.space.vary[ENCODER], journal.space.rungs
    choices = parameter.values if isinstance(parameter, Choices) else ()
    lines = []
    for each in by_choice(rows, len(rungs), ENCODER, choices):
        best = [""] * 3
        if each.best is not None:
            best = [f"{each.best['error']:.4f}", f"{each.best['training']:.0f}", f"{each.best['inference']:.0f}"]
        first = "" if each.first is None else f"{each.first:.4f}"
        lines.append([f"`{each.value}`", str(each.tried), str(each.finished), first, *best])
    headings = ["encoder", "trials", "finished", f"lowest error at {rungs[0]:.3g} s", f"at {rungs[-1]:.3g} s"]
    return table([*headings, "its training structures/s", "its inference structures/s"], lines)


def trials(journal: Journal, rows: Sequence[TrialRow]) -> list[str]:
    """A line for each trial."""
    names = short_names(list(journal.space.vary))
    lines = []
    for row in rows:
        last = row.results[-1]
        results = [f"{last['error']:.4f}", f"{last['training']:.0f}", f"{last['inference']:.0f}"]
        lines.append([str(row.number), *results, *(shown_value(row.values[key]) for key in names)])
    return table(["trial", "error", "training", "inference", *names.values()], lines)


def main() -> None:
    """Write search.md and its pictures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    journal = open_journal(parser.parse_args().out)
    rows, colours = trial_rows(journal), colours_of(journal.space)
    known = [row for row in rows if row.results]
    pictures = {
        "progress": (progress_picture(known, journal.space, colours), "Errors as they came in, and from rung to rung"),
        "front": (front_picture(known, journal.space, colours), "Errors against structures/s, with the Pareto fronts"),
        "settings": (settings_picture(known, journal.space, colours), "Errors at the first rung by setting"),
    }
    lines = [TEXT.format(**numbers(journal, rows)), *encoders(journal, rows)]
    lines += [f"The best {BEST} (structures/s in training and in inference, cutoff in Å):", ""]
    lines += trials(journal, ranked(rows)[:BEST])
    lines += ["Those that no other one beats in both error and structures/s of inference:", ""]
    lines += trials(journal, front_rows(rows, "inference", journal.space.search.rungs))
    if (found := importances(journal, rows)) is not None:
        names = short_names(list(journal.space.vary))
        shares = ", ".join(f"{names[key]} {value:.0%}" for key, value in found.values.items())
        lines += [f"Being among the best {found.best} at the first rung depends on (PED-ANOVA): {shares}.", ""]
    for name, (figure, text) in pictures.items():
        figure.savefig(PAGES / f"search-{name}.png", dpi=100)
        lines += [f"![{text}](search-{name}.png)", ""]
    failed = [row for row in rows if row.state == "failed"]
    lines += table(["failed trial", "why"], [[str(row.number), row.reason] for row in failed]) if failed else []
    (PAGES / "search.md").write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
