"""A run that ended, and the same stopped on its way."""

import pytest

from tests.rough_weather.small import train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An unbroken run of 12 steps, with a checkpoint every 3."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, keep=9)
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """A run that has checkpoints after 3, 6 and 9 steps; 6 is `last`."""
    saved = tmp_path / "checkpoints"
    saved.mkdir()
    for step in (3, 6, 9):
        name = f"step-{step:08d}.pt"
        (saved / name).write_bytes((whole / "checkpoints" / name).read_bytes())
    (saved / "last").symlink_to("step-00000009.pt")
    return tmp_path
