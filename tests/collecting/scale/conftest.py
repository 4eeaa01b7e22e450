"""What all tests of several processes share: what one process makes."""

import pytest
from processes import make_undisturbed


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Where model and text lie, and beside them the dataset of one process."""
    return make_undisturbed(tmp_path_factory.mktemp("undisturbed"))
