"""A run of 12 tiny steps with a checkpoint every 3, for tests that do it harm."""

from firstsight import engine
from tests.tiny import Patches, config


def train(folder, source=None, salt=0, **values):
    """Start the run in `folder`, or go on with it."""
    settings = config("simclr", folder, loggers=("jsonl",), **values)
    return engine.pretrain("simclr", settings, source or Patches(), None, folder, salt)


def newest(folder):
    """The last checkpoint of a run that `stopped`."""
    return folder / "checkpoints" / "step-00000009.pt"
