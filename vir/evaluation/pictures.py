"""Image files as users name them: files, folders with all below them, URLs. Names come one by one, bytes when read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vir.addresses import expand, is_remote, shown
from vir.data.decode import FOREIGN, BadSampleError
from vir.data.sources.listing import IMAGE_EXTENSIONS
from vir.data.sources.reading import MAX_IMAGE_BYTES, OF_THE_FILE
from vir.data.stores.choose import open_store
from vir.errors import DataError, SettingsError
from vir.files import read_regular, retried

ENDINGS = (*IMAGE_EXTENSIONS, *(f".{kind.extension}" for kind in FOREIGN), ".tif", ".pbm", ".pgm", ".pnm")
"""Of the files in a folder that are taken for images, in upper or lower case. A file that is named itself may have any:
the format follows from the bytes."""

MOST_URLS = 1 << 16
"""That one text with braces may stand for."""


def pictures(words: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Paths and URLs of the images that the words name, in their order; those of a folder and the folders in it sorted
    by name, without hidden ones.

    Links are followed, but not back into a folder that they are in. In memory are the names of the folders on the way.

    Raises:
        DataError: a path is not there, or a folder cannot be listed.
        SettingsError: a URL that is none, or of no known kind of server.
    """
    for given in words:
        word = os.fspath(given)
        if is_remote(word) and not os.path.lexists(word):
            yield from expand(word, MOST_URLS)
        elif os.path.isdir(word):
            yield from _in_folder(word, ())
        elif os.path.lexists(word):
            yield word
        else:
            raise DataError(f"there is no {shown(word)!r}; give image files, folders of them or URLs")


def count_pictures(words: Sequence[str | os.PathLike[str]], timeout: float) -> int:
    """How many images the words name: at the door, before anything is loaded.

    Args:
        timeout: of servers, see Store, in seconds.

    Raises:
        DataError, SettingsError: as `pictures`; also where a folder holds no image.
    """
    total = 0
    for word in words:
        count = 0
        for name in pictures([word]):
            count += 1
            if is_remote(name):
                open_store(name, timeout)
        if not count:
            raise DataError(f"{os.fspath(word)} holds no images: files that end in {' '.join(ENDINGS)}; give another "
                            "folder, or the files themselves")
        total += count
    if not total:
        raise SettingsError("no images are given; give image files, folders of them or URLs")
    return total


def read_picture(name: str, timeout: float) -> bytes:
    """All bytes of an image file.

    Raises:
        BadSampleError: it cannot be read, or has more than MAX_IMAGE_BYTES.
        StoreError: a server does not give it.
    """
    if is_remote(name) and not os.path.lexists(name):
        store = open_store(name, timeout)
        identity = store.stat(name)
        if identity.size > MAX_IMAGE_BYTES:
            raise BadSampleError(f"it has {identity.size} bytes, more than the {MAX_IMAGE_BYTES} that an image may "
                                 "have")
        return b"".join(store.blocks(name, identity))
    try:
        return retried(lambda: read_regular(name, MAX_IMAGE_BYTES), OF_THE_FILE)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadSampleError(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error


def to_stream(name: str, timeout: float) -> bytes | Path:
    """What strips of an image file are decoded from: its path, or all bytes of one of a server. Raises as read_picture.
    """
    return read_picture(name, timeout) if is_remote(name) and not os.path.lexists(name) else Path(name)


def _in_folder(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        state = os.stat(folder)
        with os.scandir(folder) as entries:
            found = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error
    here = state.st_dev, state.st_ino
    if here in above:
        return
    for name, is_folder in found:
        path = str(Path(folder, name))
        if is_folder:
            yield from _in_folder(path, (*above, here))
        elif name.lower().endswith(ENDINGS):
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: it is taken for a file, and reading it tells
        return False


if __name__ == "__main__":
    raise SystemExit("vir.evaluation.pictures is a part of the library; the program is vir-predict")
