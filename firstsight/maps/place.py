"""Points in two dimensions for features in many: three ways, none of them the truth."""

from __future__ import annotations

import base64
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from firstsight import keyed
from firstsight.errors import UserError
from firstsight.pairs import Pairs
from firstsight.sources.base import Source
from firstsight.views.apply import resize

How = Literal["pca", "tsne", "umap"]

PERPLEXITY = 30
"""Neighbours that count in t-SNE, or a third of the points where there are fewer than 90."""
NEIGHBOURS = 15
"""Neighbours that count in UMAP."""
_THUMBNAIL = 40  # pixels of the longer side


def placed(values: Tensor, how: How, seed: int = 0) -> NDArray[np.float64]:
    """(N, 2) points for the directions of the rows of `values` (N, D), in -1 to 1.

    `pca`: the two directions in which they differ most; distances shrink, and nothing is invented.
    `tsne` (van der Maaten and Hinton 2008, https://jmlr.org/papers/v9/vandermaaten08a.html), on 50
    principal components as ssl-small draws it, and `umap` (McInnes et al. 2018,
    https://arxiv.org/abs/1802.03426) keep neighbours together: distances between clusters, and
    their sizes, mean nothing. Raises `UserError` where scikit-learn or umap-learn is missing, or
    there are fewer than four points.
    """
    if len(values) < 4:
        raise UserError(f"a map of {len(values)} points shows nothing; give --data more images")
    units = F.normalize(values.double(), dim=1)
    if how == "pca":
        points = principal(units, 2)
    else:
        few = principal(units, 50).numpy().astype(np.float32)
        points = torch.from_numpy(_tsne(few, seed) if how == "tsne" else _umap(few, seed)).double()
    points = points - (points.amax(dim=0) + points.amin(dim=0)) / 2
    found: NDArray[np.float64] = (points / points.abs().max().clamp_min(1e-12)).numpy()
    return found


def principal(x: Tensor, count: int) -> Tensor:
    """(N, count or fewer) coordinates of the rows of `x` (N, D) along their principal directions.

    Of a direction and its opposite the one is taken whose largest part is positive.
    """
    centred = x - x.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    found: Tensor = centred @ (directions * largest.sign()).T
    return found


def _tsne(x: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError(
            "--map tsne needs a package; pip install 'firstsight[maps]', or use --map pca"
        ) from None
    perplexity = min(PERPLEXITY, (len(x) - 1) / 3)
    found: NDArray[np.float32] = TSNE(
        perplexity=perplexity, init="pca", random_state=seed
    ).fit_transform(x)
    return found


def _umap(x: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    try:
        from umap import UMAP
    except ImportError:
        raise UserError(
            "--map umap needs a package; pip install 'firstsight[maps]', or use --map pca"
        ) from None
    neighbours = min(NEIGHBOURS, len(x) - 1)
    init = "spectral" if len(x) > 10 else "random"  # of so few there are too few eigenvectors
    found: NDArray[np.float32] = UMAP(
        n_neighbors=neighbours, random_state=seed, n_jobs=1, init=init
    ).fit_transform(x)
    return found


def drawn(
    seen: Pairs, how: How, count: int, names: tuple[str, ...], seed: int = 0
) -> dict[str, Any]:
    """A map of `count` images and their two views, as `page` shows it; JSON holds it.

    They are drawn by `seed`: the first ones of a folder would be of its first classes. All three of
    an image are placed together, as ssl-small draws its triangles.
    """
    count = min(count, len(seen.original))
    random = np.random.default_rng(keyed.seed(seed, count))
    some = torch.from_numpy(np.sort(random.permutation(len(seen.original))[:count]))
    values = torch.cat([part[some] for part in (seen.original, seen.first, seen.second)])
    points = placed(values, how, seed)
    labels = None if seen.labels is None else seen.labels[some].tolist()
    positions = seen.positions[some].T.flatten().tolist()
    return {
        "how": how,
        "images": count,
        "points": [[round(float(x), 4), round(float(y), 4)] for x, y in points],
        "labels": labels,
        "classes": list(names),
        "names": [seen.source.identity(i) for i in positions[:count]],
        "thumbnails": [thumbnail(seen.source, i) for i in positions],
    }


def thumbnail(source: Source, index: int) -> str:
    """Image `index`, small, as a data URI."""
    pixels = source.pixels(index)
    height, width = pixels.shape[:2]
    scale = _THUMBNAIL / max(height, width)
    small = resize(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
    quality = [cv2.IMWRITE_JPEG_QUALITY, 80]
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]), quality)
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
