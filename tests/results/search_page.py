"""Write the page about the search over six encoders: `python -m results.search_page OUT`.

The search is `hydrazero search tests/results/search.space.toml --trials 70 --workers 2`; OUT is its `search.out`.
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
PICTURES = {
    "progress": "Errors in the order of the trials, and from one comparison to the next",
    "front": "Errors against structures per second, with the Pareto fronts",
    "settings": "Errors at the first comparison by setting",
}
FRONT = "The Pareto front: no other trial has both a lower error and a faster inference than one of these."
IMPORTANCE = (
    "How much each setting decides whether a trial is among the best {best} at the first comparison (PED-ANOVA)"
)

TEXT = """# A search over six encoders on three tasks

Which encoder and which settings learn most in a few minutes? `hydrazero search` tried out encoders, their sizes, the
cutoff, the learning rate, the batch and the sampling on three tasks. `make sixteen DATA=FOLDER` converts
{tasks}; then these commands run the search and write this page:

```sh
hydrazero search tests/results/search.space.toml --trials {done} --workers 2
PYTHONPATH=tests python -m results.search_page {out}
```

The search ran {trials} trials ({states}) in {minutes:.0f} minutes on 2 CPU cores, each trial on one core. All trials
together spent {trained:.0f} minutes on training steps. Trials are compared after {rungs} s of training, and about one
in {reduction} continues past each comparison. The learning rate is constant after a warm-up, and the moving average
of the weights is evaluated. Steps are not compiled, which favours small models with few operations.

The *error* of a trial is its validation MAE divided by that of the trivial predictor (reference energies alone, zero
forces). It is the geometric mean over the tasks and, for each task, over energies and forces. This search finds
settings that learn fast: what is best after {last} s need not be best after a day.
"""


def numbers(journal: Journal, rows: Sequence[TrialRow]) -> dict[str, Any]:
    """Return what the page says about the search."""
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
    """Return a table with a row for each encoder: its number of trials and the best of them."""
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
    return table([*headings, "training, structures/s", "inference, structures/s"], lines)


def trials(journal: Journal, rows: Sequence[TrialRow]) -> list[str]:
    """Return a table with a row for each trial."""
    names = short_names(list(journal.space.vary))
    lines = []
    for row in rows:
        last = row.results[-1]
        results = [f"{last['error']:.4f}", f"{last['training']:.0f}", f"{last['inference']:.0f}"]
        lines.append([str(row.number), *results, *(shown_value(row.values[key]) for key in names)])
    return table(["trial", "error", "training", "inference", *names.values()], lines)


def main() -> None:
    """Write search.md and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    journal = open_journal(parser.parse_args().out)
    rows, colours = trial_rows(journal), colours_of(journal.space)
    known = [row for row in rows if row.results]
    pictures = {
        "progress": progress_picture(known, journal.space, colours),
        "front": front_picture(known, journal.space, colours),
        "settings": settings_picture(known, journal.space, colours),
    }
    lines = [TEXT.format(**numbers(journal, rows)), *encoders(journal, rows)]
    lines += [f"The {BEST} trials with the lowest errors (training and inference in structures/s, cutoff in Å):", ""]
    lines += trials(journal, ranked(rows)[:BEST])
    lines += [FRONT, ""]
    lines += trials(journal, front_rows(rows, "inference", journal.space.search.rungs))
    if (found := importances(journal, rows)) is not None:
        names = short_names(list(journal.space.vary))
        shares = ", ".join(f"{names[key]} {value:.0%}" for key, value in found.values.items())
        lines += [f"{IMPORTANCE.format(best=found.best)}: {shares}.", ""]
    for name, figure in pictures.items():
        figure.savefig(PAGES / f"search-{name}.png", dpi=100)
        lines += [f"![{PICTURES[name]}](search-{name}.png)", ""]
    failed = [row for row in rows if row.state == "failed"]
    lines += table(["failed trial", "reason"], [[str(row.number), row.reason] for row in failed]) if failed else []
    (PAGES / "search.md").write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
