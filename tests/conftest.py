"""What all tests share."""

from hypothesis import settings

# No time for an example: the first one loads torch, and machines that test may be busy with other things.
settings.register_profile("hydrazero", deadline=None)
settings.load_profile("hydrazero")
