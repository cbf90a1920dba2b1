"""Plans for tests: `hydrazero plan` of the exascale run file, with round numbers as results of a bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from hydrazero.launch.cli.main import main
from hydrazero.launch.cli.plan import plan_settings
from hydrazero.launch.job.site_file import load_site
from hydrazero.launch.plan.compute import named_bench
from hydrazero.launch.plan.plan import plan as plan_of
from hydrazero.launch.plan.request import PlanRequest
from hydrazero.trainer.config.run_file import load_run_config

LAUNCH = Path(__file__).parents[2] / "launch"
EXASCALE, SITES = LAUNCH / "runs" / "exascale.toml", LAUNCH / "sites"
RATES = {"compiled_train_cu_atoms": 4000.0, "compiled_train_benzene_atoms": 8000.0}
RATES |= {"eager_train_cu_atoms": 1000.0, "eager_train_benzene_atoms": 2000.0}
RATES |= {"pipeline_molecules_per_s": 4000.0, "pipeline_metals_per_s": 2000.0}


def write_bench(folder: Path, rates: dict[str, float] = RATES) -> Path:
    path = folder / "bench.json"
    path.write_text(json.dumps([{"name": name, "value": value} for name, value in rates.items()]))
    return path


def write_site(folder: Path, *changes: tuple[str, str]) -> str:
    """Write the site file of Frontier with other numbers; return its name."""
    text = (SITES / "frontier.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def planned(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", str(EXASCALE), *map(str, arguments)])


def plan(folder: Path, site: str = "frontier", nodes: int = 1, ranks: int = 0, *changes: str) -> dict[str, Any]:
    """Return the document of a plan, without tables and figure; `ranks` per node, 0 for one for each device."""
    machine = load_site(site)
    return plan_of(
        PlanRequest(
            settings=plan_settings(load_run_config(EXASCALE, changes)),
            site=machine,
            nodes=nodes,
            ranks_per_node=ranks or machine.nodes.dies,
            global_batch=0,
            hours=0.0,
            bench=named_bench(write_bench(folder)),
        )
    )


def refused(*arguments: object) -> str:
    """Return the sentence with which a plan is rejected."""
    result = planned(*arguments)
    assert result.exit_code == 1 and result.output.startswith("Error: ") and result.output.count("\n") == 1
    return result.output
