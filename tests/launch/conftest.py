"""What the tests of launch/ share."""

import pytest
from fake_cloud import Cloud


@pytest.fixture
def cloud(tmp_path):
    """A cloud on this machine, empty."""
    return Cloud(tmp_path / "cloud")
