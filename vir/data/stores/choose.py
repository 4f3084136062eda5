"""Which store has a URL."""

from __future__ import annotations

from vir.addresses import shown
from vir.data.stores.http import HttpStore
from vir.data.stores.objects import PACKAGES, ObjectStore
from vir.data.stores.store import Store
from vir.errors import SettingsError

_HTTP = ("http", "https")
_stores: dict[tuple[str, float], Store] = {}


def open_store(url: str, timeout: float) -> Store:
    """The store that has `url`; one per process and scheme. Nothing is asked of a server.

    Args:
        timeout: see Store, in seconds.

    Raises:
        SettingsError: no store knows the scheme, or its package is not installed.
    """
    scheme = url.partition("://")[0].lower()
    if "://" not in url or (scheme not in _HTTP and scheme not in PACKAGES):
        raise SettingsError(f"{shown(url)!r} is on no server that data is read from; known are "
                            f"{', '.join(sorted([*_HTTP, *PACKAGES]))}")
    key = "http" if scheme in _HTTP else scheme, timeout
    if key not in _stores:
        _stores.setdefault(key, HttpStore(timeout) if scheme in _HTTP else ObjectStore(scheme, timeout))
    return _stores[key]


if __name__ == "__main__":
    raise SystemExit("vir.data.stores.choose is a part of the library; the program is vir-train")
