"""Where data lies, as users type it: paths, URLs, patterns with braces, and several of them joined by `::`."""

import re
from itertools import islice
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from braceexpand import braceexpand

from vir.errors import SettingsError

HIDDEN = "***"
"""What stands for a secret where a URL is shown."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31})://")
_RANGE = re.compile(r"\{(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})")

_JOINT = re.compile(r"::(?=\s*(?:[A-Za-z][A-Za-z0-9+.-]{0,31}://|file:|pipe:|exec:|shell:|cmd:|command:|\|))")
_PORT = re.compile(r"[0-9{},.]*(?:::.*)?", re.DOTALL)
# What is in the query of a signed address besides the object: another one comes with each signing.
_SIGNATURE = re.compile(r"x-(amz|goog|oss|cos|obs)-.*|awsaccesskeyid|googleaccessid|ossaccesskeyid|signature|expires|"
                        r"policy|key-pair-id|token|sig|s[veprst]|srt|spr|sk(oid|tid|[tesv])", re.IGNORECASE)

_RUNS = re.compile(r"\s*(?:(?:pipe|exec|shell|cmd|command):|\|)")
_COUNTED = re.compile(r".*\|\s*[0-9]+\s*$", re.DOTALL)
_WEIGHTED = re.compile(r".*(?:\.tar|\.tgz|\.gz|[}*])@[0-9]*\.?[0-9]+\s*$|\s*[0-9]*\.[0-9]+\s*\*|"
                       r"\s*[0-9]+\s*\*\s*[a-z0-9]+:/", re.DOTALL)
_CACHES = ("simplecache", "filecache", "blockcache", "cached")


def is_remote(text: str) -> bool:
    """Whether this is the URL of something on a server; a path or a file: URL is not."""
    found = _SCHEME.match(text)
    return found is not None and found[1].lower() != "file"


def shown(url: str) -> str:
    """The same text without what may be a secret: user and password, query and fragment of each URL, commands.

    For messages, logs and config files. Takes whatever a user may give, also several URLs in one text.
    """
    return "::".join(map(_shown, _JOINT.split(url)))


def _shown(part: str) -> str:
    if command := _RUNS.match(part):
        return command[0] + HIDDEN
    if part.rstrip().endswith("|"):
        return f"|{HIDDEN}"
    done = ""
    while True:
        scheme = _SCHEME.search(part)
        before = part if scheme is None else part[:scheme.start()]
        if done and (query := re.search("[?#]", before)):
            return done + before[:query.end()] + HIDDEN
        if scheme is None:
            return done + part
        done += part[:scheme.end()]
        part = _without_login(part[scheme.end():])


def _without_login(rest: str) -> str:
    """What follows :// with user and password hidden, also where a password has characters that should be %XX."""
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    end = host.rfind("@")
    if end < 0 and ":" in host and not _PORT.fullmatch(host.partition(":")[2]):
        end = rest.rfind("@")
    return rest if end < 0 else HIDDEN + rest[end:]


def place(url: str) -> str:
    """Which object a URL names, whoever asks and whenever the URL was signed: without user, signature and fragment.

    Not to be shown: what else is in the query may be a secret.
    """
    parts = urlsplit(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True)
            if not _SIGNATURE.fullmatch(name)]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(kept), fragment="").geturl()


def expand(spec: str, limit: int) -> list[str]:
    """The paths and URLs that a text names, in its order: parts are split at `::`, braces are expanded, file: URLs
    become paths. Globs stay as they are.

    Args:
        limit: the most that may be named.

    Raises:
        SettingsError: commands, weights, counts, braces that do not match, more than `limit`.
    """
    addresses: list[str] = []
    for part in spec.split("::"):
        _refuse(part, spec)
        addresses += [_local(address) for address in _expanded(part, limit)]
        if len(addresses) > limit:
            raise SettingsError(f"{shown(spec)!r} names more than {limit} files; name fewer")
    return addresses


def _refuse(part: str, spec: str) -> None:
    """Raises SettingsError for a part that means something which other programs do and this one does not."""
    if not part.strip():
        raise SettingsError(f"{shown(spec)!r} has an empty part; give paths or URLs, joined by '::' if they are many")
    if _COUNTED.match(part):
        raise SettingsError(f"{shown(part)!r} has a number of samples after '|', as timm takes it; leave it out: "
                            "samples are counted from the shards")
    if _RUNS.match(part) or part.rstrip().endswith("|"):
        raise SettingsError(f"{shown(part)!r} asks to run a command, which is refused; give the URL itself, or "
                            "download the files and give their path")
    if _WEIGHTED.match(part):
        raise SettingsError(f"{shown(part)!r} has a weight; weights are not supported: every image comes once in an "
                            "epoch; leave it out")
    if part.strip() in _CACHES:
        raise SettingsError(f"{shown(spec)!r} names {part.strip()}, a cache of fsspec that can be left with half a "
                            "file; leave it out and give --data.cache")
    if is_remote(part) and not part.isprintable():
        raise SettingsError(f"the URL {shown(part)!r} has characters that cannot be printed; write them as %XX")


def _expanded(part: str, limit: int) -> list[str]:
    if any(abs(int(last) - int(first)) >= limit for first, last in _RANGE.findall(part)):
        raise SettingsError(f"{shown(part)!r} names more than {limit} files; name fewer")  # a list of them takes memory
    try:
        return list(islice(braceexpand(part), limit + 1))
    except ValueError as error:  # of its subclass for unbalanced braces, too
        raise SettingsError(f"{shown(part)!r} has braces that do not match; close each '{{' by '}}'") from error


def _local(address: str) -> str:
    """The path that a file: URL means; anything else as it is."""
    if not address.lower().startswith("file:"):
        return address
    parts = urlsplit(address)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path or "\0" in path:
        raise SettingsError(f"{shown(address)!r} is no file of this computer; write file:///path, or the path alone")
    return path


if __name__ == "__main__":
    raise SystemExit("vir.addresses is a part of the library; the program is vir-train")
