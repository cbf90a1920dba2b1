"""How ranks say with which kind of end they ended."""

MAY_PASS = 75
"""Exit status of a rank that has lost another one (EX_TEMPFAIL of sysexits.h)."""
FAILED = 70
"""Exit status of a rank with an error that is not meant for users (EX_SOFTWARE)."""
