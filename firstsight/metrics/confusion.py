"""Which classes are taken for which, and what follows: accuracy and overlap of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """(K, K) how many rows of class i were found to be j, from `truth` and `found`, (N,) each."""
    pairs = (truth * classes + found).bincount(minlength=classes * classes)
    return pairs.view(classes, classes)


def class_ious(table: Tensor) -> Tensor:
    """(K,) percent of each class of a `confusion`: right over right, missed and wrongly found.

    High is good. Not a number for a class that is neither there nor found.
    """
    right = table.diagonal().double()
    return 100 * right / (table.sum(dim=0) + table.sum(dim=1) - right)


def worst_classes(table: Tensor, names: tuple[str, ...], most: int = 10) -> list[dict[str, Any]]:
    """The classes of a `confusion` that are found least often, the worst first.

    Each with its number of images, `top1` in percent, and the class that it is most often taken
    for (empty where it never is), `times`. Classes without images are left out.
    """
    count = table.sum(dim=1)
    share = (table.diagonal().double() / count).nan_to_num(2.0)  # no image: last
    found = []
    for label in share.argsort(stable=True).tolist()[:most]:
        if count[label] == 0:
            break
        others = table[label].clone()
        others[label] = 0
        times, other = int(others.max()), int(others.argmax())
        found.append(
            {
                "class": named(names, label),
                "images": int(count[label]),
                "top1": 100 * float(share[label]),
                "taken_for": named(names, other) if times else "",
                "times": times,
            }
        )
    return found


def named(names: tuple[str, ...], label: int) -> str:
    """The name of a class; its number where it has none."""
    return names[label] if label < len(names) else str(label)


TABLED = 100
"""Classes up to which a confusion is written down whole: more than that nobody reads."""


def confused(table: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """What a result says of a `confusion`: the worst classes and, of up to 100, all of it."""
    worst = {"worst_classes": worst_classes(table, names)}
    if len(table) > TABLED:
        return worst
    whole = {"classes": [named(names, i) for i in range(len(table))], "table": table.tolist()}
    return {"confusion": whole, **worst}
