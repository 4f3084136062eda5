"""HTTP requests over connections that are kept: redirects, logins and proxies, and what their failures mean."""

from __future__ import annotations

import functools
import logging
import netrc
import os
import ssl
import time
from base64 import b64encode
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import (
    HTTPError,
    LocationValueError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    SSLError,
    TimeoutError,
)

from vir.addresses import shown
from vir.data.stores.retries import WINDOW, PassingError
from vir.data.stores.store import MAX_CONNECTIONS, StoreError
from vir.data.stores.wire import POOLS, expect

MAX_REDIRECTS = 5

_DRAINED = 1024  # bytes that are read sooner than a connection is opened
_DRAINS_S = 0.05  # seconds for that
# Its warnings of odd headers show whole URLs, with their signatures.
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)

_REDIRECTS = (301, 302, 303, 307, 308)


class Connections:
    """To servers of http: and https:, shared by threads; a forked process opens its own."""

    def __init__(self) -> None:
        # By process and proxy. Those of a parent are kept and not used: to close them could wait for a lock that
        # another of its threads held at the fork.
        self._managers: dict[tuple[int, str | None], urllib3.PoolManager] = {}
        self._proxies: dict[tuple[str, str], str | None] = {}  # by scheme and host

    def get(self, url: str, headers: dict[str, str], left: float, patience: float) -> BaseHTTPResponse:
        """The answer to a GET after all redirects, its body still to be read.

        Args:
            left: seconds for all of it.
            patience: seconds for the head of each answer.
        """
        until = time.monotonic() + left
        try:
            place, origin = url, _origin(url)
        except ValueError:
            raise _no_url(url) from None
        for _ in range(MAX_REDIRECTS + 1):
            own = _login(url) if _origin(place) == origin else {}
            response = self._request(url, place, headers | own, min(patience, max(0.05, until - time.monotonic())))
            target = response.headers.get("Location")
            if response.status not in _REDIRECTS or target is None:
                return response
            leave(response)
            place = _redirected(url, place, target)
        raise StoreError(f"{shown(url)} is redirected more than {MAX_REDIRECTS} times; give the URL at the end")

    def _request(self, url: str, place: str, headers: dict[str, str], patience: float) -> BaseHTTPResponse:
        manager = self._manager(place)
        try:
            return manager.request("GET", _bare(place), headers={"Accept-Encoding": "identity", **headers},
                                   preload_content=False, decode_content=False, redirect=False, retries=False,
                                   timeout=urllib3.Timeout(connect=min(WINDOW, patience), read=patience))
        except SSLError as error:
            if isinstance(error.args[0] if error.args else None, ssl.SSLCertVerificationError):
                raise StoreError(f"{shown(url)}: the certificate of its server is not trusted; name the file of your "
                                 "certificate authority in SSL_CERT_FILE") from error
            raise passing(error) from error
        except LocationValueError as error:
            raise _no_url(url) from error
        except (HTTPError, OSError, ValueError) as error:  # ValueError: of a number of thousands of digits
            raise passing(error) from error

    def _manager(self, place: str) -> urllib3.PoolManager:
        parts = urlsplit(place)
        of = parts.scheme.lower(), parts.hostname or ""
        if of not in self._proxies:
            self._proxies[of] = None if proxy_bypass(of[1]) else getproxies().get(of[0])
        key = os.getpid(), self._proxies[of]
        if key not in self._managers:
            self._managers.setdefault(key, _new_manager(key[1]))
        return self._managers[key]


def leave(response: BaseHTTPResponse) -> None:
    """Gives the connection back for the next request where little or nothing is left of the answer and is there by now,
    else closes it."""
    remaining = response.length_remaining
    try:
        if remaining is not None and remaining <= _DRAINED:
            expect(response, _DRAINS_S)
            response.read()
            response.release_conn()
        else:
            response.close()
    except (HTTPError, OSError):
        response.close()


def passing(error: Exception) -> PassingError:
    """What a failure of the wire was, in words of ours: those of a library may hold what is secret."""
    if isinstance(error, PassingError):
        return error
    if isinstance(error, NameResolutionError):
        return PassingError("is on a host whose name is not known")
    if isinstance(error, NewConnectionError):
        return PassingError("is on a host that takes no connection")
    if isinstance(error, ProxyError):
        return PassingError("cannot be reached through the proxy of the environment")
    if isinstance(error, TimeoutError):
        return PassingError("sent nothing for too long")
    return PassingError(f"broke off its answer ({type(error).__name__})")


def _no_url(url: str) -> StoreError:
    return StoreError(f"{shown(url)} has no host, or none that can be; write https://HOST/PATH")


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(scheme)


def _bare(url: str) -> str:
    """Without user, password and fragment."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))


def _redirected(url: str, place: str, target: str) -> str:
    """Where a redirect leads. Raises StoreError where that is no longer safe."""
    try:
        new = _bare(urljoin(place, target))
        scheme = _origin(new)[0]
    except ValueError:
        raise StoreError(f"{shown(url)} is redirected to something that is no URL; give the URL at the end") from None
    if scheme not in ("http", "https") or (scheme, urlsplit(place).scheme.lower()) == ("http", "https"):
        raise StoreError(f"{shown(url)} is redirected to {shown(new)}, which is refused: from https to https alone, "
                         "and from http to http or https; give the URL at the end if you trust it")
    return new


def _login(url: str) -> dict[str, str]:
    """The header with user and password for the host of a URL, if there are any."""
    parts = urlsplit(url)
    if parts.username is not None:
        return _basic(unquote(parts.username), unquote(parts.password or ""))
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        found = _netrc(path, os.stat(path).st_mtime_ns).authenticators(parts.hostname or "")
    except FileNotFoundError:
        return {}
    except (OSError, netrc.NetrcParseError) as error:
        line = f", line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else ""
        raise StoreError(f"cannot read {path}{line}; mend it, or name another file in NETRC") from None
    return _basic(found[0], found[2] or "") if found else {}


def _basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(f"{user}:{password}".encode()).decode()}


def _new_manager(proxy: str | None) -> urllib3.PoolManager:
    if proxy is None:
        return _with_wires(urllib3.PoolManager(num_pools=32, maxsize=MAX_CONNECTIONS))
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        parts = urlsplit(proxy)
        headers = _basic(unquote(parts.username), unquote(parts.password or "")) if parts.username else {}
        return _with_wires(urllib3.ProxyManager(_bare(proxy), num_pools=32, maxsize=MAX_CONNECTIONS, proxy_headers={
            f"Proxy-{name}": value for name, value in headers.items()}))
    except (HTTPError, ValueError):
        raise StoreError("the proxy that http_proxy or https_proxy names is no http:// or https:// URL; mend it, or "
                         "name the host in no_proxy") from None


def _with_wires(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    manager.pool_classes_by_scheme = POOLS
    return manager


@functools.lru_cache(4)
def _netrc(path: str, changed_ns: int) -> netrc.netrc:
    """As it was at that time: it is looked at for each request."""
    return netrc.netrc(path)


if __name__ == "__main__":
    raise SystemExit("vir.data.stores.connections is a part of the library; the program is vir-train")
