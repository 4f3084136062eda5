"""Objects in what fsspec knows: S3, Google Cloud Storage, Azure, the Hugging Face Hub, HDFS and others."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import fsspec
import fsspec.config

from vir.addresses import shown
from vir.data.executors import Stopped, stopping
from vir.data.stores.retries import FLOOR, PASSING, PassingError, persist, retry_after
from vir.data.stores.store import MAX_BLOCK, MAX_CONNECTIONS, Identity, MissingError, StoreError, changed, check_part
from vir.errors import SettingsError

PACKAGES = {
    "s3": "'vir-at-scale[s3]'", "s3a": "'vir-at-scale[s3]'", "gs": "'vir-at-scale[gcs]'", "gcs": "'vir-at-scale[gcs]'",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "hf": "huggingface_hub", "oss": "ossfs", "oci": "ocifs",
    "tos": "tosfs", "hdfs": "pyarrow", "webhdfs": "requests", "sftp": "paramiko", "ssh": "paramiko",
    "smb": "smbprotocol", "memory": "fsspec",
}
"""What pip installs for each scheme. Those of fsspec's that are missing here are local, keep copies, are made of other
ones, run something, or have no large files."""

_SLICE = 0.1  # seconds between two looks whether to stop

_S3 = ("s3", "s3a")
_ONE_AT_A_TIME = ("sftp", "ssh", "smb")  # their connection is not for threads
_TAGS = ("ETag", "etag", "generation", "blob_id", "last_commit", "mtime", "LastModified", "last_modified",
         "modificationTime", "updated", "created")
_LOGINS = {
    **dict.fromkeys(_S3, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to those of someone who may "
                    "read it and list its folder; for a public bucket set FSSPEC_S3_ANON=true"),
    **dict.fromkeys(("gs", "gcs"), "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS "
                    "to the key file of someone who may read it; for a public bucket set FSSPEC_GS_TOKEN=anon"),
    **dict.fromkeys(("az", "abfs", "abfss"), "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or "
                    "AZURE_STORAGE_SAS_TOKEN"),
    "hf": "run hf auth login, or set HF_TOKEN to a token of someone who may read it",
}

_NO_LOGIN = re.compile(r"Credential|ProfileNotFound|Unauthori[sz]ed|Authenti|Forbidden|GatedRepo|TokenRetrieval")
_OF_THE_WIRE = re.compile(r"Connect|Timeout|Payload|Incomplete|HTTPClientError|ResponseParser|TransportError|"
                          r"ServiceRe(quest|sponse)Error|ChecksumError")


def try_to_import(scheme: str) -> None:
    """Raises SettingsError where the package for a scheme of PACKAGES is not installed."""
    if scheme in ("gs", "gcs"):
        # With its newest features gcsfs starts threads of gRPC, which do not survive the fork of a loader's workers.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise SettingsError(f"{scheme}:// needs a package that is not installed: pip install "
                            f"{PACKAGES[scheme]}") from error


class ObjectStore:
    """All that has one of the schemes in PACKAGES. Each library looks for credentials and endpoints by itself.

    Args:
        timeout: see Store, in seconds.

    Raises:
        SettingsError: the package for this scheme is not installed.
    """

    def __init__(self, scheme: str, timeout: float) -> None:
        try_to_import(scheme)
        self._scheme, self._timeout = scheme, timeout
        # By process and options. Those of a parent are kept and not used: their event loop does not run in a child,
        # and closing them would wait for it.
        self._systems: dict[tuple[int, str], Any] = {}
        self._locks: dict[int, threading.Lock] = {}

    def stat(self, url: str) -> Identity:
        return persist(lambda left, _: self._stat(url, left), url, self._timeout)

    def read(self, url: str, offset: int, size: int, identity: Identity) -> bytes:
        check_part(url, offset, size, identity)
        if not size:
            return b""
        return persist(lambda left, patience: self._read(
            url, offset, offset + size, identity, min(left, patience + size / FLOOR)), url, self._timeout)

    def blocks(self, url: str, identity: Identity) -> Iterator[bytes]:
        for start in range(0, identity.size, MAX_BLOCK):
            yield self.read(url, start, min(MAX_BLOCK, identity.size - start), identity)
        if self.stat(url) != identity:  # where a part cannot be asked for under a condition, it may have been another
            raise changed(url)

    def names(self, url: str) -> list[str] | None:
        return persist(lambda left, _: self._names(url, left), url, self._timeout)

    def _stat(self, url: str, left: float) -> Identity:
        info = self._call(url, left, "info")
        if info["type"] != "file":
            raise MissingError(f"{shown(url)} is a folder, not a file; give the URL of a file")
        tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
        return Identity(int(info["size"]), tag)

    def _read(self, url: str, start: int, end: int, identity: Identity, limit: float) -> bytes:
        if self._scheme in _S3 and identity.tag.startswith('"'):
            data = self._call(url, limit, _read_s3, start=start, end=end, tag=identity.tag)
        else:
            data = self._call(url, limit, "cat_file", start=start, end=end)
        if len(data) != end - start:
            raise PassingError(f"sent {len(data)} bytes when asked for {end - start}")
        return bytes(data)

    def _names(self, url: str, left: float) -> list[str]:
        entries = self._call(url, left, "ls", detail=True)
        return sorted(entry["name"].rpartition("/")[2] for entry in entries
                      if entry["type"] == "file" and not entry["name"].endswith("/"))

    def _call(self, url: str, limit: float, method: str | Callable[..., Any], **arguments: Any) -> Any:
        """What a method of the file system returns for the path of `url`; or a function that takes both.

        Args:
            limit: seconds.

        Raises:
            PassingError, StoreError: instead of all that a library raises.
            Stopped: the task that this is a part of is to end.
        """
        until = time.monotonic() + limit
        system = self._system(url, limit)
        limit = max(0.0, until - time.monotonic())
        try:
            path = system._strip_protocol(url)
            if method in ("info", "ls"):
                system.invalidate_cache()  # what was listed before may have changed
            if callable(method):
                return _outcome(asyncio.run_coroutine_threadsafe(method(system, path, **arguments), system.loop), limit)
            if system.async_impl:
                work = getattr(system, f"_{method}")(path, **arguments)
                return _outcome(asyncio.run_coroutine_threadsafe(work, system.loop), limit)
            if method == "cat_file":
                arguments["cache_type"] = "none"  # else up to 5 MB more are read ahead each time
            return _in_time(lambda: self._alone(limit, getattr(system, method), path, **arguments), limit)
        except Stopped:
            raise
        except Exception as error:
            raise _translated(error, url, self._scheme) from error

    def _alone(self, limit: float, method: Callable[..., Any], *values: Any, **arguments: Any) -> Any:
        if self._scheme not in _ONE_AT_A_TIME:
            return method(*values, **arguments)
        lock = self._locks.setdefault(os.getpid(), threading.Lock())
        if not lock.acquire(timeout=limit):
            raise TimeoutError
        try:
            return method(*values, **arguments)
        finally:
            lock.release()

    def _system(self, url: str, limit: float) -> Any:
        """The file system of `url`. To make it may take long: many a library looks for credentials then."""
        try:
            kind = fsspec.get_filesystem_class(self._scheme)
            options = kind._get_kwargs_from_urls(url)
            key = os.getpid(), repr(sorted(options.items()))
            if key in self._systems:
                return self._systems[key]
            made = _in_time(lambda: _new_system(self._scheme, kind, options), limit)
        except Stopped:
            raise
        except Exception as error:
            told = _translated(error, url, self._scheme)
            if isinstance(told, PassingError):
                told = PassingError(f"{told} while credentials were looked for: {_login_of(self._scheme)}", told.after)
            raise told from error
        return self._systems.setdefault(key, made)


def _new_system(scheme: str, kind: Any, options: dict[str, Any]) -> Any:
    if scheme not in _S3:
        return kind(**options, skip_instance_cache=True)
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    system = kind(**options, skip_instance_cache=True, config_kwargs={
        "max_pool_connections": MAX_CONNECTIONS, **given, "retries": {"total_max_attempts": 1}})
    system.retries = 1  # `persist` alone waits and tries again
    return system


async def _read_s3(system: Any, path: str, start: int, end: int, tag: str) -> bytes:
    """A part of an object as long as it has this ETag."""
    bucket, key, version = system.split_path(path)
    condition = {"VersionId": version} if version else {"IfMatch": tag}
    answer = await system._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **condition)
    async with answer["Body"] as body:
        return await body.read()


def _in_time(work: Callable[[], Any], limit: float) -> Any:
    """The result of a function that does not end by itself in time: then it is left to its thread."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return _outcome(future, limit)


def _outcome(future: Future[Any], limit: float) -> Any:
    """Raises TimeoutError after `limit` seconds, Stopped where the task is to end; what can be cancelled is then."""
    until = time.monotonic() + limit
    while not stopping():
        left = until - time.monotonic()
        if wait([future], max(0.0, min(left, _SLICE))).done:
            return future.result()
        if left <= _SLICE:
            future.cancel()
            raise TimeoutError
    future.cancel()
    raise Stopped


def _translated(error: Exception, url: str, scheme: str) -> Exception:
    """What an error of a library means, in words of ours: its own may hold what is secret."""
    if isinstance(error, (PassingError, StoreError)):
        return error
    chain = _chain(error)
    if _OF_THE_WIRE.search(_names(error)):
        return PassingError(f"gave no whole answer ({type(error).__name__})")
    status, answer = next(((found, one) for one in chain if (found := _status(one))), (0, error))
    has_no_login = any(_NO_LOGIN.search(_names(one)) for one in chain) or str(error).startswith("Forbidden")
    if has_no_login or isinstance(error, PermissionError) or status in (401, 403):
        return StoreError(f"{shown(url)} is refused ({status or type(error).__name__}): {_login_of(scheme)}")
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)) or status in (404, 410):
        return MissingError(f"{shown(url)} does not exist; see whether bucket and path are right")
    if status in (412, 416):
        return changed(url)
    if status in PASSING:
        return PassingError(f"answered {status}", retry_after(_header(answer, "retry-after")))
    if not status and isinstance(error, OSError):
        return PassingError(f"cannot be read now ({type(error).__name__})")
    return StoreError(f"{shown(url)} cannot be read: {status or type(error).__name__}; see whether the URL is right")


def _login_of(scheme: str) -> str:
    return _LOGINS.get(scheme, "see how its library is given user and password")


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while len(chain) < 8 and (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def _names(error: BaseException) -> str:
    return " ".join(kind.__name__ for kind in type(error).__mro__)


def _status(error: BaseException) -> int:
    """HTTP's status in an error of botocore, gcsfs, azure, requests or httpx; 0 where there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None) or getattr(error, "status_code", None) or getattr(
            error, "status", None) or getattr(error, "code", None)
    return int(found) if str(found).isdecimal() and 300 <= int(found) < 600 else 0


def _header(error: BaseException, name: str) -> str | None:
    response = getattr(error, "response", None)
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}) if isinstance(response, dict) else getattr(
        response, "headers", {})
    return headers.get(name)


if __name__ == "__main__":
    raise SystemExit("vir.data.stores.objects is a part of the library; the program is vir-train")
