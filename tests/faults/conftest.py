"""Runs that nothing befell, to compare with."""

import pytest

from tests.faults.harness import reference


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    return reference(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    return reference(4, tmp_path_factory.mktemp("four"))
