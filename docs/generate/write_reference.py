"""Write the generated pages of the reference into docs/reference: `make docs` does so before it builds the site.

Each page is a template (templates/NAME.md) with one or more places {{...}} for what is read from the code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from reference_commands import markdown_of_commands
from reference_keys import markdown_of

from hydrazero.launch.cli.main import main as command_line
from hydrazero.launch.job.site_file import Measure, Site
from hydrazero.models.screening.prototypes import GenerateSettings
from hydrazero.shards.convert.settings import ConvertSettings
from hydrazero.trainer.config.precision import precision_of
from hydrazero.trainer.config.run_file import RunConfig
from hydrazero.trainer.config.schedule_shapes import SHAPES
from hydrazero.trainer.search.space import Range, SearchSection

HERE = Path(__file__).parent
PAGES = HERE.parent / "reference"
INLINE = {Measure: "`{value = number, source = text}`"}
"""Classes that stand in a cell of a table."""
ROOTS: dict[str, tuple[type, ...]] = {
    "run-file": (RunConfig,),
    "conversion": (ConvertSettings,),
    "site-file": (Site,),
    "search-space": (SearchSection, Range),
    "generated-structures": (GenerateSettings,),
    "deepspeed": tuple(SHAPES.values()),
}
"""Page -> classes whose keys are on it."""


def space_tables() -> str:
    """Return [search] and the form of a range."""
    search, bounds = (markdown_of(cls) for cls in (SearchSection, Range))
    return f"## `[search]` {{ #search }}\n\n{search}\n## Ranges under `[vary]` {{ #range }}\n\n{bounds}"


def schedule_tables() -> str:
    """Return the parameters of the schedules that DeepSpeed does not have."""
    parts = [f"### `{name}`\n\n{shape.__doc__}\n\n{markdown_of(shape)}" for name, shape in SHAPES.items()]
    return "\n".join(parts)


def packaged_configurations() -> str:
    """Return a table of the DeepSpeed JSONs that come with the package."""
    rows = ["| name | ZeRO stage | precision | optimizer state |", "|---|---|---|---|"]
    for entry in sorted(resources.files("hydrazero.ds_configs").iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".json"):
            document = json.loads(entry.read_text(encoding="utf-8"))
            zero = document["zero_optimization"]
            place = "in main memory (offload)" if "offload_optimizer" in zero else "on the device"
            precision = precision_of(document)
            label = precision.label + (" (GPU only)" if precision.gpu else "")
            rows.append(f"| `{entry.name.removesuffix('.json')}` | {zero['stage']} | {label} | {place} |")
    return "\n".join(rows)


PLACES: dict[str, Callable[[], str]] = {
    "run-file": lambda: markdown_of(RunConfig, skip=("deepspeed",)),
    "conversion": lambda: markdown_of(ConvertSettings),
    "site-file": lambda: markdown_of(Site, INLINE),
    "search-space": space_tables,
    "generated-structures": lambda: markdown_of(GenerateSettings),
    "schedules": schedule_tables,
    "deepspeed": packaged_configurations,
    "commands": lambda: markdown_of_commands(command_line),
}


def pages() -> dict[str, str]:
    """Return the generated pages by their names."""
    written = {}
    for template in sorted((HERE / "templates").glob("*.md")):
        text = template.read_text(encoding="utf-8")
        for place, content in PLACES.items():
            if f"{{{{{place}}}}}" in text:
                text = text.replace(f"{{{{{place}}}}}", content())
        written[template.name] = text
    return written


def main() -> None:
    """Write all pages."""
    PAGES.mkdir(exist_ok=True)
    for name, text in pages().items():
        (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
