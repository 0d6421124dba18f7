"""Images in folders, a folder a class, as torchvision's ImageFolder has them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError


@dataclass
class Folder:
    """A folder that is read like a shard: what is an offset there is a file's number here.

    Attributes:
        path: as given.
        size: bytes of all images.
        stems: of every image its path below the folder, with ``/`` and without the extension:
            the key of its sample.
        kinds: of every image its extension, with the dot.
        modified: int64 ``[images]``: when it was changed last, in nanoseconds.
    """

    path: str
    size: int
    stems: list[str]
    kinds: list[str]
    modified: NDArray[np.int64]
    samples: int = 0

    what = "folder"
    name = "."
    """In hashes: where the folder lies does not matter."""

    def read(self, number: int, size: int) -> bytes:
        """The bytes of an image.

        Raises:
            DataError: it is gone, or has changed since the folder was listed.
        """
        path = os.path.join(self.path, self.stems[number] + self.kinds[number])
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (size, int(self.modified[number])):
                    raise DataError(
                        f"image {path} has changed since it was listed; run the command again"
                    )
                return file.read(size + 1)
        except OSError as error:
            raise DataError(f"cannot read image {path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
        folder: its images, in the order of classes, then of paths.
        sizes: bytes of every image.
        labels: number of every image's class among the sorted class folders; -1 where the images
            lie in the folder itself.
        ignored: files that are no images by their extension, below the folder.
    """

    folder: Folder
    sizes: list[int]
    labels: list[int]
    ignored: list[str]


def list_folder(path: str, kinds: Sequence[str]) -> Listing:
    """List the images below a folder; hidden files and folders are passed over.

    Args:
        kinds: extensions of images in small letters, without the dot.

    Raises:
        DataError: it cannot be listed, images lie beside class folders, a class folder has none,
            it is the folder above those with the class folders, a link leads back to a folder above
            it, or a name is not UTF-8.
    """
    root = path.rstrip("/") or "/"
    own, classes = _entries(root)
    found: list[tuple[int, str, os.DirEntry[str]]] = [(-1, entry.name, entry) for entry in own]
    empty = []
    for label, entry in enumerate(classes):
        below = list(_below(entry, entry.name, [os.path.realpath(root)]))
        found += [(label, name, file) for name, file in below]
        if not any(_is_image(name, kinds) for name, _ in below):
            empty.append(entry.name)
    images = [(label, name, entry) for label, name, entry in found if _is_image(name, kinds)]
    ignored = [name for _, name, _ in found if not _is_image(name, kinds)]
    if not images:
        return Listing(Folder(path, 0, [], [], np.zeros(0, np.int64)), [], [], ignored)
    if images[0][0] < 0 and images[-1][0] >= 0:
        raise DataError(
            f"folder {path} has images beside class folders, such as {images[0][1]!r} and "
            f"{images[-1][1]!r}: name a folder with either"
        )
    if empty and images[-1][0] >= 0:
        raise DataError(
            f"class folder {os.path.join(path, empty[0])} holds no image "
            f"({', '.join(kinds)}): fill or remove it, for classes are numbered in the order of "
            "their names"
        )
    _refuse_folder_above(path, [name for label, name, _ in images if label >= 0])
    images.sort(key=lambda image: (image[0], image[1]))
    split = [os.path.splitext(name) for _, name, _ in images]
    try:
        for stem, _ in split:
            stem.encode()
    except UnicodeEncodeError:
        raise DataError(f"image {stem!r} in folder {path} has a name that is not UTF-8") from None
    try:
        states = [entry.stat() for _, _, entry in images]
    except OSError as error:
        raise DataError(f"folder {path} cannot be listed: {error}") from error
    sizes = [state.st_size for state in states]
    folder = Folder(
        path,
        sum(sizes),
        [stem for stem, _ in split],
        [kind for _, kind in split],
        np.array([state.st_mtime_ns for state in states], np.int64),
    )
    return Listing(folder, sizes, [label for label, _, _ in images], ignored)


def _refuse_folder_above(path: str, names: Sequence[str]) -> None:
    """Refuse class folders such as ``train`` and ``val``: none holds an image itself, and one holds
    several folders of them. One folder in each, such as ``images``, is a habit of some data sets.

    Args:
        names: of images in class folders, their paths below ``path``.
    """
    parts = [name.split("/") for name in names]
    within = {(first, second) for first, second, *rest in parts if rest}
    tops = sorted({first for first, *_ in parts})
    if within and all(len(part) > 2 for part in parts) and len(within) > len(tops):
        example = max(tops, key=lambda top: sum(first == top for first, _ in within))
        shown = ", ".join(tops[:4]) + (", ..." if len(tops) > 4 else "")
        raise DataError(
            f"the folders in {path} ({shown}) would be the classes, and they hold no images but "
            f"folders of them: name the folder that holds the class folders, such as "
            f"{os.path.join(path, example)}"
        )


def _is_image(name: str, kinds: Sequence[str]) -> bool:
    return os.path.splitext(name)[1][1:].lower() in kinds


def _entries(path: str) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Files and folders of a folder, each by name."""
    try:
        with os.scandir(path) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        shown = [entry for entry in entries if not entry.name.startswith(".")]
        folders = [entry.is_dir() for entry in shown]
    except OSError as error:
        raise DataError(
            f"folder {path} cannot be listed: {error.strerror or error}; check data.shards"
        ) from error
    files = [entry for entry, is_folder in zip(shown, folders, strict=True) if not is_folder]
    return files, [entry for entry, is_folder in zip(shown, folders, strict=True) if is_folder]


def _below(
    folder: os.DirEntry[str], name: str, above: list[str]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    real = os.path.realpath(folder.path)
    if real in above:
        raise DataError(f"folder {folder.path} is a link to a folder that it lies in")
    files, folders = _entries(folder.path)
    for file in files:
        yield f"{name}/{file.name}", file
    for inner in folders:
        yield from _below(inner, f"{name}/{inner.name}", [*above, real])
