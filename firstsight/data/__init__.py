"""Images on disk: laid out so that they can be a source."""

from __future__ import annotations

from firstsight.data.imagenet import sort_imagenet_val

__all__ = ["sort_imagenet_val"]
