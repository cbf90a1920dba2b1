"""The HTML page about a search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hydrazero.shards.text.foreign_text import for_html
from hydrazero.trainer.records.run_log import shown
from hydrazero.trainer.report.markup import facts, paragraph, picture, table, write_page
from hydrazero.trainer.report.search_plots import (
    RATES,
    colours_of,
    front_picture,
    importance_picture,
    progress_picture,
    settings_picture,
)
from hydrazero.trainer.search.campaign import command_of
from hydrazero.trainer.search.importances import importances
from hydrazero.trainer.search.journal import Journal
from hydrazero.trainer.search.space import Choices
from hydrazero.trainer.search.trial_rows import (
    STATES,
    TrialRow,
    by_choice,
    front_rows,
    headings_of,
    ranked,
    short_names,
    shown_value,
    trial_rows,
)

PAGE_NAME = "search.html"
"""Name of the page in the folder of the search."""
SHOWN = 10
"""Number of trials in the table of the best ones."""
OBJECTIVE = (
    "Error: the mean absolute error on the validation split divided by that of the trivial predictor (the task's "
    "reference energies alone, zero forces). It is the geometric mean over the tasks and, for each task, over energies "
    "and forces."
)


def write_search_page(journal: Journal) -> Path:
    """Write search.html with the results so far into the search's folder, and return its path."""
    rows = trial_rows(journal)
    parts = [*_heading(journal, rows), *_best(journal, rows), *_choices(journal, rows), *_pictures(journal, rows)]
    parts += [*_failed(rows), _everything(journal, rows)]
    return write_page(f"search {journal.out.name}", parts, journal.out / PAGE_NAME)


def _heading(journal: Journal, rows: Sequence[TrialRow]) -> list[str]:
    section, states = journal.space.search, Counter(row.state for row in rows)
    counted = ", ".join(f"{states[name]} {name}" for name in STATES.values() if states[name])
    rungs = ", ".join(f"{seconds:.3g}" for seconds in journal.space.rungs)
    trained = sum(row.results[-1]["seconds"] for row in rows if row.results)
    ends = [each["at"] for row in rows for each in row.results]
    wall = (max(ends) - min(row.began for row in rows)) / 60 if ends else 0.0
    return [
        f"<h1>{for_html(str(journal.out))}</h1>",
        facts(
            f"{len(rows)} trials: {counted}; {wall:.0f} minutes, {trained / 60:.0f} minutes of training by all workers"
        ),
        facts(f"{section.run}: tasks {', '.join(journal.trivial)}"),
        facts(f"rungs at {rungs} s of training; one in {section.reduction} trials is promoted to the next rung"),
        paragraph(OBJECTIVE),
    ]


def _results(journal: Journal, rows: Sequence[TrialRow], marked: bool = False) -> str:
    """Return a table of trials with their errors, seconds, rates and values."""
    headings = ["trial", "error", "seconds", "training\nstructures/s", "inference\nstructures/s"]
    headings += headings_of(list(journal.space.vary))
    cells = []
    for row in rows:
        last = row.results[-1]
        numbers = [f"{last['error']:.4f}", f"{last['seconds']:.0f}", f"{last['training']:.0f}"]
        values = [shown_value(row.values[key]) for key in journal.space.vary]
        cells.append([str(row.number), *numbers, f"{last['inference']:.0f}", *values])
    return table(headings, cells, best={(0, 1)} if marked else ())


def _best(journal: Journal, rows: Sequence[TrialRow]) -> list[str]:
    best = ranked(rows)
    command = command_of(journal, best[0])
    return [
        "<h2>Best trials</h2>",
        _results(journal, best[:SHOWN], marked=True),
        paragraph("This command trains with the values of the best trial and the schedule and steps of the run file:"),
        f"<pre>{for_html(command.replace(' --set ', _NEXT_LINE))}</pre>",
        *_errors_by_task(journal, best[0]),
    ]


_NEXT_LINE = " \\\n    --set "


def _errors_by_task(journal: Journal, row: TrialRow) -> list[str]:
    """Return a table of the best trial's errors in each task."""
    headings = ["task", "energy MAE\nmeV/atom", "trivial", "force MAE\nmeV/Å", "trivial"]
    cells = []
    for task, quantities in journal.trivial.items():
        line = [task]
        for quantity, digits in (("energy", 2), ("forces", 1)):
            if quantity in quantities:
                found = row.results[-1]["tasks"][task][quantity]
                line += [f"{found:.{digits}f}", f"{quantities[quantity]:.1f}"]
            else:
                line += ["-", "-"]
        cells.append(line)
    return [paragraph(f"Errors of trial {row.number} on the validation splits:"), table(headings, cells)]


def _choices(journal: Journal, rows: Sequence[TrialRow]) -> list[str]:
    """Return a table of the best trials by choice, for each setting that is chosen from a list."""
    parts: list[str] = []
    seconds = journal.space.rungs
    headings = [
        "choice",
        "trials",
        "finished",
        f"lowest error\nat {seconds[0]:.3g} s",
        f"lowest error\nat {seconds[-1]:.3g} s",
    ]
    headings += ["its training\nstructures/s", "its inference\nstructures/s"]
    for key, parameter in journal.space.vary.items():
        if not isinstance(parameter, Choices) or len(parameter.values) < 2:
            continue
        found = by_choice(rows, len(seconds), key, parameter.values)
        cells = [
            [
                str(each.value),
                str(each.tried),
                str(each.finished),
                shown(each.first, 4),
                *(shown(None if each.best is None else each.best[k], d) for k, d in _OF_THE_BEST),
            ]
            for each in found
        ]
        errors = [each.best["error"] for each in found if each.best is not None]
        best = {(n, 4) for n, each in enumerate(found) if each.best is not None and each.best["error"] == min(errors)}
        name = short_names(list(journal.space.vary))[key]
        parts += [f"<h3>By {for_html(name)}</h3>", table(headings, cells, best=best)]
    return parts


_OF_THE_BEST = (("error", 4), ("training", 0), ("inference", 0))


def _pictures(journal: Journal, rows: Sequence[TrialRow]) -> list[str]:
    space, colours = journal.space, colours_of(journal.space)
    known = [row for row in rows if row.results]
    parts = ["<h2>Errors over time</h2>", picture(progress_picture(known, space, colours), "errors over time, by rung")]
    parts += ["<h2>Errors against speed</h2>", picture(front_picture(known, space, colours), "errors against speed")]
    for rate in RATES if not space.search.rate else [space.search.rate]:
        if front := front_rows(known, rate, space.search.rungs):
            parts += [f"<h3>Pareto front, error and structures/s in {rate}</h3>", _results(journal, front)]
    parts += [f"<h2>Errors by setting, at {space.rungs[0]:.3g} s</h2>"]
    parts += [picture(settings_picture(known, space, colours), "errors at the first rung against each setting")]
    found = importances(journal, rows)
    if found is None:
        return [*parts, "<h2>Importances</h2>", paragraph("There are too few trials so far.")]
    text = (
        f"How much each setting decides whether a trial is among the best {found.best} of {found.trials} at the first "
        f"rung (PED-ANOVA, Watanabe et al. 2023). The importances add up to 1."
    )
    return [*parts, "<h2>Importances</h2>", paragraph(text), picture(importance_picture(found.values), "importances")]


def _failed(rows: Sequence[TrialRow]) -> list[str]:
    failed = [row for row in rows if row.state == "failed"]
    if not failed:
        return []
    cells = [[str(row.number), row.reason] for row in failed]
    return ["<h2>Failed trials</h2>", table(["trial", "reason"], cells, texts=(0, 1))]


def _everything(journal: Journal, rows: Sequence[TrialRow]) -> str:
    """Return a table of all trials, folded."""
    keys = list(journal.space.vary)
    cells = []
    for row in rows:
        errors = [f"{each['error']:.4f}" for each in row.results]
        errors += [""] * (journal.space.search.rungs - len(errors))
        values = [shown_value(row.values[key]) if key in row.values else "" for key in keys]
        cells.append([str(row.number), row.state, *errors, *values])
    headings = [
        "trial",
        "state",
        *(f"error at\n{seconds:.3g} s" for seconds in journal.space.rungs),
        *headings_of(keys),
    ]
    held = table(headings, cells, texts=(0, 1))
    return f'<details class="run"><summary>All trials</summary>{held}</details>'
