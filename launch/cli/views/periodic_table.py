"""Positions of the elements in the periodic table of 18 columns."""

from __future__ import annotations

NOBLE_GASES = (0, 2, 10, 18, 36, 54, 86, 118)
"""Atomic numbers that end the periods."""

LANTHANIDES, ACTINIDES = range(57, 72), range(89, 104)
"""Atomic numbers of the elements that are shown in two separate rows below the table."""

ROWS, COLUMNS = 9, 18


def place_of(number: int) -> tuple[int, int]:
    """Return (row 0 to 8, column 0 to 17) of an atomic number from 1 to 118; rows 7 and 8 hold the f block."""
    if number in LANTHANIDES:
        return 7, 2 + number - LANTHANIDES[0]
    if number in ACTINIDES:
        return 8, 2 + number - ACTINIDES[0]
    period = next(row for row in range(7) if number <= NOBLE_GASES[row + 1])
    first = number - NOBLE_GASES[period] - 1  # columns from the left
    from_right = NOBLE_GASES[period + 1] - number  # columns from the right
    s_block = 1 if period == 0 else 2
    return (period, first) if first < s_block else (period, COLUMNS - 1 - from_right)
