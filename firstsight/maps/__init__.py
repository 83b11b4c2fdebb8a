"""Features as points on a page: where they are placed, and the drawing that shows photographs.

`page` and what it imports never import torch, so that reports can show maps.
"""
