"""Images on disk: laid out so that they can be a source, and looked at."""

from __future__ import annotations

from firstsight.data.imagenet import sort_imagenet_val
from firstsight.data.looked import info
from firstsight.data.packing import pack
from firstsight.data.static import views
from firstsight.data.subsets import subset
from firstsight.data.zipped import verify, zip_up

__all__ = ["info", "pack", "sort_imagenet_val", "subset", "verify", "views", "zip_up"]
