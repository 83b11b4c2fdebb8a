"""Where two views of an image show the same: boxes of one place in the pixels of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ATTEMPTS = 50
"""Candidates for each box; where none is unlike the others, the last one is kept."""


@dataclass(frozen=True, kw_only=True)
class BoxRule:
    """How matched boxes are drawn."""

    count: int = 10
    """n, boxes for each image."""
    min_size: int = 32
    """Shortest side of a box, pixels of the view that shows the place smaller."""
    max_iou: float = 0.5
    """Boxes of an image overlap less than this, intersection over union; 1: any."""
    jitter: float = 0.0
    """Boxes of the second view move and grow by at most this share of their sides."""
    grid: bool = True
    """A box lies in a cell of a grid drawn for it: small boxes are frequent; else anywhere."""


class Matched(NamedTuple):
    """n boxes for each of B images, of the same places in two views."""

    first: Tensor
    """(B, n, 4) x1, y1, x2, y2 in pixels of the first view, within it."""
    second: Tensor
    """(B, n, 4), the same of the second view."""
    usable: Tensor
    """(B,) of bool: the views share enough; the boxes of other images are the whole view."""


def matched_boxes(
    crops_1: Tensor,
    flips_1: Tensor,
    crops_2: Tensor,
    flips_2: Tensor,
    size: int,
    *,
    rule: BoxRule | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(M, 5) rows for RoIAlign in each view: image, x1, y1, x2, y2 in pixels of the view.

    Row i is the same place in both, for `rule.count` places of each image whose views share enough;
    images whose views do not have no rows. crops (B, 4) are x1, y1, x2, y2 in pixels of the
    original, flips (B,) of bool, `size` the side of both views. `matched_places` has fixed shapes.
    """
    matched = matched_places(
        crops_1, flips_1, crops_2, flips_2, size, rule=rule, generator=generator
    )
    return box_rows(matched.first, matched.usable), box_rows(matched.second, matched.usable)


def box_rows(boxes: Tensor, kept: Tensor) -> Tensor:
    """(M, 5) of boxes (B, n, 4): the number of the image, then the box, where `kept` (B,) says."""
    image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    numbers = image[:, None, None].expand(-1, boxes.shape[1], 1)
    return torch.cat([numbers, boxes], dim=2)[kept].flatten(0, 1)


def matched_places(
    crops_1: Tensor,
    flips_1: Tensor,
    crops_2: Tensor,
    flips_2: Tensor,
    size: int,
    *,
    rule: BoxRule | None = None,
    generator: torch.Generator | None = None,
) -> Matched:
    """Boxes of places that both views of an image show (Roh et al. 2021, section 3.2, and code).

    Places are drawn in the pixels of the view that shows the overlap smaller, so that boxes have
    `rule.min_size` pixels in both; an overlap that is no larger than that makes the image unusable.
    As in the authors' code a candidate, as it was drawn, is compared with the boxes of its image
    that were kept, cut off at the border of the first view; jitter comes after the flip.

    Shapes do not depend on what is drawn. Draws are in float64 (float32 on mps) from `generator`.
    """
    rule = rule or BoxRule()
    dtype = torch.float32 if crops_1.device.type == "mps" else torch.float64
    crops = torch.stack([crops_1, crops_2]).to(dtype)  # (2, B, 4)
    corner, scale = crops[..., :2], size / (crops[..., 2:] - crops[..., :2])  # (2, B, 2): x, y
    start = corner.amax(dim=0)  # (B, 2) of the overlap, pixels of the original
    least = scale.amin(dim=0)
    extent = ((crops[..., 2:].amin(dim=0) - start) * least).round()  # half to even, as Python
    usable = (extent > rule.min_size).all(dim=1)  # (B,)
    extent = torch.where(usable[:, None], extent, float(size + rule.min_size))  # any that can be

    u = torch.rand(
        (len(extent), rule.count, _ATTEMPTS, 12),
        dtype=dtype,
        device=crops.device,
        generator=generator,
    )
    draw = _in_a_cell if rule.grid else _anywhere
    place = draw(extent[:, None, None], rule.min_size, u[..., :8])  # (B, n, attempts, 4)

    zoom = (scale / least)[:, :, None, None].repeat(1, 1, 1, 1, 2)  # (2, B, 1, 1, 4)
    shift = ((start - corner) * scale)[:, :, None, None].repeat(1, 1, 1, 1, 2)
    first, second = place * zoom + shift  # (B, n, attempts, 4) each
    first, second = _flipped(first, flips_1, size), _flipped(second, flips_2, size)
    second = _jittered(second, 1 + rule.jitter * (2 * u[..., 8:] - 1))

    chosen = _unlike(first, size, rule.max_iou)[..., None, None].expand(-1, -1, 1, 4)
    whole = first.new_tensor([0, 0, size, size])
    boxes = [
        torch.where(usable[:, None, None], b.gather(2, chosen).squeeze(2).clamp(0, size), whole).to(
            torch.promote_types(crops_1.dtype, torch.float32)
        )
        for b in (first, second)
    ]
    return Matched(boxes[0], boxes[1], usable)


def _whole_number(u: Tensor, low: Tensor | int, high: Tensor) -> Tensor:
    """Whole numbers from `low` to `high`, both included, by u in [0, 1)."""
    return low + (u * (high - low + 1)).floor()


def _in_a_cell(extent: Tensor, least: int, u: Tensor) -> Tensor:
    """(..., 4) boxes in an overlap of `extent` (..., 2): a grid, a cell of it, a box within."""
    number, which, sides, place = (u[..., i : i + 2] for i in range(0, 8, 2))
    cells = _whole_number(number, 1, (extent / least).floor())
    cell = extent / cells
    corner = (_whole_number(which, 0, cells - 1) * cell).floor()
    side = _whole_number(sides, least, cell.floor())
    corner = corner + _whole_number(place, 0, (cell - side).floor())
    return torch.cat([corner, corner + side], dim=-1)


def _anywhere(extent: Tensor, least: int, u: Tensor) -> Tensor:
    """(..., 4) boxes in an overlap of `extent` (..., 2), which they never fill."""
    side = _whole_number(u[..., 4:6], least, extent - 1)
    corner = _whole_number(u[..., 6:8], 0, extent - side - 1)
    return torch.cat([corner, corner + side], dim=-1)


def _flipped(boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    left, top, right, bottom = boxes.unbind(dim=-1)
    mirrored = torch.stack([size - right, top, size - left, bottom], dim=-1)
    return torch.where(flips[:, None, None, None], mirrored, boxes)


def _jittered(boxes: Tensor, factors: Tensor) -> Tensor:
    """Corners moved by (factor - 1) of the sides (..., :2), then sides times factors (..., 2:)."""
    side = boxes[..., 2:] - boxes[..., :2]
    corner = boxes[..., :2] + side * (factors[..., :2] - 1)
    return torch.cat([corner, corner + side * factors[..., 2:]], dim=-1)


def _unlike(candidates: Tensor, size: int, most: float) -> Tensor:
    """(B, n) which of the attempts (B, n, attempts, 4) each box is, one box after the other."""
    chosen, kept = [], candidates[:, :0, 0]  # (B, 0, 4)
    for tried in candidates.unbind(dim=1):  # (B, attempts, 4)
        good = (_ious(tried, kept) < most).all(dim=-1) | (most == 1)
        first = torch.where(good.any(dim=1), good.to(torch.int8).argmax(dim=1), _ATTEMPTS - 1)
        chosen.append(first)
        box = tried.gather(1, first[:, None, None].expand(-1, 1, 4))
        kept = torch.cat([kept, box.clamp(0, size)], dim=1)
    return torch.stack(chosen, dim=1)


def _ious(boxes: Tensor, others: Tensor) -> Tensor:
    """(B, p, q) intersection over union of boxes (B, p, 4) and others (B, q, 4)."""
    boxes, others = boxes[:, :, None], others[:, None]
    start = torch.maximum(boxes[..., :2], others[..., :2])
    end = torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = (end - start).clamp_min(0).prod(dim=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(dim=-1) for b in (boxes, others)]
    return shared / (areas[0] + areas[1] - shared)
