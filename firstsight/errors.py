"""What a user can mend, said in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: shown as one sentence, exit code 2, no traceback."""


MANY = 24
"""More names than these are no answer."""


def unknown(kind: str, value: str, allowed: Iterable[str], listed: str = "--help") -> UserError:
    """An error that names the offending `value`, its nearest match, and all that is `allowed`.

    Of many names only the nearest, and what lists them all.
    """
    names = list(allowed)
    many = len(names) > MANY
    near = difflib.get_close_matches(value, names, n=4 if many else 1, cutoff=0.5)
    guess = f" (did you mean {', '.join(map(repr, near))}?)" if near else ""
    every = f"{listed} lists all" if many else f"there are: {', '.join(names)}"
    return UserError(f"no {kind} called {value!r}{guess}; {every}")


def require_positive(prefix: str, settings: object, *names: str) -> None:
    """Refuse fields of `settings` that are not above 0 (or are no numbers at all)."""
    for name in names:
        value = getattr(settings, name)
        if not value > 0:  # so that NaN is refused too
            raise UserError(f"{prefix}{name.replace('_', '-')} must be above 0, not {value}")


def require_share(prefix: str, settings: object, *names: str) -> None:
    """Refuse fields of `settings` that are not between 0 and 1."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise UserError(f"{prefix}{name.replace('_', '-')} must be from 0 to 1, not {value}")


def require_not_negative(prefix: str, settings: object, *names: str) -> None:
    """Refuse fields of `settings` that are below 0 (or are no numbers at all)."""
    for name in names:
        value = getattr(settings, name)
        if not value >= 0:  # so that NaN is refused too
            flag = f"{prefix}{name.replace('_', '-')}"
            raise UserError(f"{flag} must not be below 0, but is {value}")
