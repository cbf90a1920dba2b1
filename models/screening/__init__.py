"""Screening: energies and forces of very many structures by many heads, written to Parquet files."""

from hydrazero.models.screening.screener import ScreenPlan, ScreenSummary, screen
from hydrazero.models.screening.settings import ScreenSettings
from hydrazero.models.screening.sources import FileSource, FunctionSource, ShardSource, Source, sources_of

__all__ = [
    "FileSource",
    "FunctionSource",
    "ScreenPlan",
    "ScreenSettings",
    "ScreenSummary",
    "ShardSource",
    "Source",
    "screen",
    "sources_of",
]
