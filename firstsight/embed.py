"""Features of the images of a source as a file that other tools read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from firstsight import checkpoint, distributed, methods
from firstsight.backbones import Layer
from firstsight.errors import UserError
from firstsight.features import Reader, extract
from firstsight.log import printable
from firstsight.sources import fetch, open_source


def run(
    checkpoint_spec: str,
    *,
    data: str,
    out: str,
    layer: Layer = "backbone",
    size: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 256,
    workers: int = 0,
    download: bool = False,
    device: str = "auto",
    threads: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the features of all images that can be read to `out`; what was written.

    A row (in Parquet) or an array (in `.npz`) each of `features` (N, C) float32, `image` (N,) the
    identities, `index` (N,) the positions in the source, and, where there are labels, `label` (N,)
    and `class` (N,) its name. Both hold the `protocol` as JSON: an array of one text, or the key
    `firstsight` of the metadata. Raises `UserError` for another suffix.
    """
    began = time.perf_counter()
    where, path = distributed.start(device, threads), Path(out)
    if path.suffix not in (".npz", ".parquet"):
        raise UserError(f"--out {out} is of no known kind; use a name in .npz or .parquet")
    if path.suffix == ".parquet":
        _pyarrow()
    if not path.resolve().parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for --out {out}; make it first")
    backbone, about = methods.network(checkpoint_spec, layer, "--layer")
    reader = Reader.like(about, size, precision=precision, batch_size=batch_size, workers=workers)
    backbone.to(where)
    if download:
        fetch(data)
    source = open_source(data)
    found = extract(backbone, source, reader)
    protocol = {"checkpoint": checkpoint_spec, "data": data, "layer": layer, **reader.protocol}
    index = found.index.numpy()
    columns: dict[str, Any] = {
        "features": found.values.numpy(),
        "image": np.array([printable(source.identity(int(i))) for i in index], dtype=np.str_),
        "index": index,
    }
    if source.labels is not None:
        columns["label"] = source.labels[index]
        if source.classes:
            names = np.array([printable(name) for name in source.classes], dtype=np.str_)
            columns["class"] = names[columns["label"]]
    if distributed.rank() == 0:
        _write(path, columns, json.dumps(protocol))
    return {
        "protocol": protocol,
        "out": out,
        "images": len(index),
        "width": backbone.width,
        "unreadable": found.unreadable,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _write(path: Path, columns: dict[str, Any], protocol: str) -> None:
    if path.suffix == ".npz":
        checkpoint.write_atomically(
            path, lambda file: np.savez(file, **columns, protocol=np.array(protocol))
        )
        return
    arrow, parquet = _pyarrow()
    features = columns.pop("features")
    flat = arrow.array(features.ravel())
    rows = {"features": arrow.FixedSizeListArray.from_arrays(flat, features.shape[1])}
    rows |= {name: arrow.array(column.tolist()) for name, column in columns.items()}
    table = arrow.table(rows).replace_schema_metadata({"firstsight": protocol})
    checkpoint.write_atomically(path, lambda file: parquet.write_table(table, file))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "writing Parquet needs a package; pip install 'firstsight[parquet]', or use .npz"
        ) from None
    return pyarrow, parquet
