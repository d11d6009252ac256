"""What the tests of launch/ share."""

import contextlib

import pytest
from fake_cloud import Cloud, small_project


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    return small_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def cloud(tmp_path, project):
    """A cloud on this machine, empty."""
    with contextlib.closing(Cloud(tmp_path / "cloud", project)) as made:
        yield made
