"""Screening: energies (and forces) of very many structures by many heads, into parquet files."""

from hydrazero.models.screening.run import ScreenPlan, ScreenSummary, screen
from hydrazero.models.screening.settings import ScreenSettings
from hydrazero.models.screening.sources import FileSource, MadeSource, ShardSource, Source, sources_of

__all__ = [
    "FileSource",
    "MadeSource",
    "ScreenPlan",
    "ScreenSettings",
    "ScreenSummary",
    "ShardSource",
    "Source",
    "screen",
    "sources_of",
]
