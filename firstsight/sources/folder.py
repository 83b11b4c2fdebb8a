"""A folder of images, nested or flat; folders of classes give labels."""

from __future__ import annotations

import errno
import os

from firstsight.errors import UserError
from firstsight.sources.files import Files
from firstsight.sources.paths import EXTENSIONS, by_folder, class_folders, is_image


class Folder(Files):
    """All images below `root`, sorted by path; hidden files and folders are passed over.

    Labels are the first-level folders where every image lies below one and there are at least two
    (`class_folders`), else there are none. Symbolic links are followed; a folder that is reached
    twice counts once, under the path that sorts first.

    Raises `UserError` where there is no such folder, it cannot be read, or it holds no image.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root)
        self.spec = self.root
        if not os.path.isdir(self.root):
            raise UserError(f"{self.root!r} is not a folder; point --data at a folder of images")
        self._paths = sorted(_images_below(self.root), key=by_folder)
        if not self._paths:
            raise UserError(
                f"no images in {self.root!r} (looked for {', '.join(EXTENSIONS)} in it and below); "
                "point --data at a folder that holds some"
            )
        self.classes, self.labels = class_folders(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def identity(self, index: int) -> str:
        """The path of image `index` relative to the root, with `/` on every platform."""
        return self._paths[index]

    def file_of(self, index: int) -> str:
        """The file of image `index`."""
        return os.path.join(self.root, self._paths[index])


def _images_below(root: str) -> list[str]:
    found: list[str] = []
    seen: set[tuple[int, int]] = set()  # links may point up, or at each other
    todo = [""]
    while todo:
        folder = todo.pop()
        absolute = os.path.join(root, folder)
        try:
            status = os.stat(absolute)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(absolute) as entries:
                inside = [(entry.name, *_kind(entry)) for entry in entries]
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot read the folder {absolute!r} ({reason}); make it readable, or point "
                "--data elsewhere"
            ) from error
        below = []
        for name, is_folder, is_file in inside:
            path = f"{folder}/{name}" if folder else name
            if is_folder and not name.startswith("."):
                below.append(path)
            elif is_file and is_image(name):
                found.append(path)
        todo.extend(sorted(below, reverse=True))  # popped in sorted order: the same link wins
    return found


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether an entry leads to a folder, and whether to a file."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:  # links in a circle lead nowhere, as broken ones do
            return False, False
        raise
