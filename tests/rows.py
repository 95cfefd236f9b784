"""Rows of pytest.mark.parametrize that only the campaigns run."""

import pytest


def rarely(*rows) -> list:
    """A row is a value, or a tuple of the values of several parameters."""
    return [pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.campaign) for row in rows]


def mostly_rarely(rows, suite) -> list:
    """All rows in their order; those that are not in `suite` are the campaigns'."""
    return [row if row in suite else rarely(row)[0] for row in rows]
