"""What a user can mend, said in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: shown as one sentence, exit code 2, no traceback."""


def unknown(kind: str, value: str, allowed: Iterable[str]) -> UserError:
    """An error that names the offending `value`, its nearest match, and all that is `allowed`."""
    names = list(allowed)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"no {kind} called {value!r}{guess}; there are: {', '.join(names)}")
