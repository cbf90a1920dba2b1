"""What all tests share."""

import os

import pytest
from hypothesis import settings

# No time for an example: the first one loads torch, and machines that test may be busy with other things.
settings.register_profile("hydrazero", deadline=None)
settings.load_profile("hydrazero")


@pytest.fixture
def fuzz_seconds(request: pytest.FixtureRequest) -> float:
    """Share of HYDRAZERO_FUZZ_MINUTES (10) that a test with the mark 'fuzz' gets."""
    tests = [item for item in request.session.items if item.get_closest_marker("fuzz")]
    return 60 * float(os.environ.get("HYDRAZERO_FUZZ_MINUTES", "10")) / max(len(tests), 1)
