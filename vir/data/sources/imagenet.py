"""The class list of ImageNet-1k, and whether a source has it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from vir.data.sources.folder import read_class_list, some
from vir.errors import DataError

_LIST = Path("data", "_info", "imagenet_synsets.txt")


def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 wnids in label order, from the file in timm's package; timm itself is not imported.

    Raises:
        DataError: there is no timm, or it has no such file.
    """
    package = importlib.util.find_spec("timm")
    folders = (package.submodule_search_locations if package is not None else None) or []
    for folder in folders:
        if (path := Path(folder) / _LIST).is_file():
            return read_class_list(path)
    raise DataError(f"no timm with {_LIST}, which has ImageNet's class list; install timm, or give the list with "
                    "--classes")


def check_classes(found: Iterable[str], classes: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The class list: `classes`, or ImageNet's if None.

    Args:
        found: the classes that the source has, in any order.
        where: names the source in the message.

    Raises:
        DataError: the source has other classes than the list.
    """
    wanted = imagenet_classes() if classes is None else tuple(classes)
    present = set(found)
    missing, unknown = sorted(set(wanted) - present), sorted(present - set(wanted))
    if missing or unknown:
        whose = "ImageNet-1k" if classes is None else "the class list"
        differences = [f"{some(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
        differences += [f"{some(unknown)} {'is' if len(unknown) == 1 else 'are'} not in the list"] if unknown else []
        raise DataError(f"{where} has other classes than the {len(wanted)} of {whose}: {' and '.join(differences)}; "
                        "complete it, or give its own list with --classes; where OUTPUT has splits with another list, "
                        "choose another --output")
    return wanted


if __name__ == "__main__":
    raise SystemExit("vir.data.sources.imagenet is a part of the library; the program is vir-convert")
