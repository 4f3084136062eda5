"""Where data lies, as users type it: paths, URLs, patterns with braces, and several of them joined by `::`."""

import re
from itertools import islice
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from braceexpand import braceexpand

from vir.errors import SettingsError

HIDDEN = "***"
"""What stands for a secret where a URL is shown."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31})://")
_RANGE = re.compile(r"\{(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})")

_START = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}):/+|^\s*//")  # also of a URL that is misspelt
_CONTAINERS = ("az", "abfs", "abfss", "oci", "hf")
"""Schemes in which what stands before @ is a part of the place, and not who asks."""
_WEB = ("http", "https")
"""Schemes with query and fragment; elsewhere ? and # are a part of the name."""
# What is in the query of a signed address besides the object: another one comes with each signing.
_SIGNATURE = re.compile(r"x-(amz|goog|oss|cos|obs)-.*|awsaccesskeyid|googleaccessid|ossaccesskeyid|signature|expires|"
                        r"policy|key-pair-id|token|sig|s[veprst]|srt|spr|sk(oid|tid|[tesv])", re.IGNORECASE)

_RUNS = re.compile(r"\s*(?:(?:pipe|exec|shell|cmd|command):|\|)")
_ANEW = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]{0,31}://|\.{0,2}/|file:|(?:pipe|exec|shell|cmd|command):|\||$|"
                   r"(?s:.*)\|\s*$)")
_COUNTED = re.compile(r".*\|\s*[0-9]+\s*$", re.DOTALL)
_WEIGHTED = re.compile(r".*(?:\.tar|\.tgz|\.gz|[}*])@[0-9]*\.?[0-9]+\s*$|\s*[0-9]*\.[0-9]+\s*\*|"
                       r"\s*[0-9]+\s*\*\s*[a-z0-9]+:/", re.DOTALL)
_CACHES = ("simplecache", "filecache", "blockcache", "cached")


def is_remote(text: str) -> bool:
    """Whether this is the URL of something on a server; a path or a file: URL is not."""
    found = _SCHEME.match(text)
    return found is not None and found[1].lower() != "file"


def parts(spec: str) -> list[str]:
    """The texts that `::` joins. After a URL or a command it joins only what begins anew: a URL, a command, or a path
    with / or ./ at its start; else it is a part of the text, as in http://[::1]/, a query or a password."""
    found: list[str] = []
    for piece in spec.split("::"):
        if found and (_START.search(found[-1]) or _RUNS.match(found[-1])) and not _ANEW.match(piece):
            found[-1] += f"::{piece}"
        else:
            found.append(piece)
    return found


def shown(url: str) -> str:
    """The same text without what may be a secret: user and password, query and fragment of each URL, commands.

    For messages, logs and config files. Takes whatever a user may give, also several URLs in one text. Rather too much
    is hidden than too little: all up to the last @ where a : comes before it.
    """
    return "::".join(map(_shown, parts(url)))


def _shown(part: str) -> str:
    if command := _RUNS.match(part):
        return command[0] + HIDDEN
    if part.rstrip().endswith("|"):
        return f"{HIDDEN}|"
    start = _START.search(part)
    if start is None:
        return part
    before, rest = part[:start.end()], part[start.end():]
    head = re.split("[?#]", rest, maxsplit=1)[0]
    query = rest[len(head):]
    if ":" in head and "@" in query:  # the ? or # may be in a password
        return before + HIDDEN
    is_login = "@" in head.partition("/")[0] and (start[1] or "").lower() not in _CONTAINERS
    if is_login or ":" in head.rpartition("@")[0]:
        head = HIDDEN + head[head.rindex("@"):]
    return before + head + (query[0] + HIDDEN if query else "")


def place(url: str) -> str:
    """Which object a URL names, whoever asks and whenever the URL was signed: without user, signature and fragment.

    Not to be shown: what else is in the query may be a secret.
    """
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    if scheme not in _WEB:
        return f"{scheme}://{host if scheme in _CONTAINERS else host.rpartition('@')[2]}{slash}{path}"
    split = urlsplit(url)
    kept = [(name, value) for name, value in parse_qsl(split.query, keep_blank_values=True)
            if not _SIGNATURE.fullmatch(name)]
    return split._replace(netloc=split.netloc.rpartition("@")[2], query=urlencode(kept), fragment="").geturl()


def expand(spec: str, limit: int) -> list[str]:
    """The paths and URLs that a text names, in its order: `parts` of it, braces expanded, schemes in small letters,
    file: URLs as paths. Globs stay as they are.

    Args:
        limit: the most that may be named.

    Raises:
        SettingsError: commands, weights, counts, braces that do not match, what is no URL, more than `limit`.
    """
    addresses: list[str] = []
    for part in parts(spec):
        _refuse(part, spec)
        addresses += [_checked(address) for address in _expanded(part, limit)]
        if len(addresses) > limit:
            raise SettingsError(f"{shown(spec)!r} names more than {limit} files; name fewer")
    return addresses


def _refuse(part: str, spec: str) -> None:
    """Raises SettingsError for a part that means something which other programs do and this one does not."""
    if is_remote(part) and "::" in part.split("?")[0].partition("://")[2].partition("/")[2]:
        raise SettingsError(f"{shown(part)!r} has '::' in its path; a path that is to be joined begins with / or ./")
    if is_remote(part) and HIDDEN in part:
        raise SettingsError(f"{shown(part)!r} was written without its secrets, as in config.yaml; give the whole URL "
                            "again")
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


def _checked(address: str) -> str:
    """The path that a file: URL means; a URL with its scheme in small letters; any other path as it is."""
    start, is_file = _START.match(address), address.lower().startswith("file:")
    if not is_file and (start is None or start[1] is None):
        return address
    try:
        split = urlsplit(address)
    except ValueError:
        raise SettingsError(f"{shown(address)!r} is no URL; write https://HOST/PATH, and [ and ] as %5B and %5D where "
                            "they are part of a name") from None
    if is_file:
        return _local(address, split)
    if not is_remote(address):
        raise SettingsError(f"{shown(address)!r} has one / after its scheme; write {split.scheme}:// for a server, or "
                            "./ before the path of a file")
    if not split.netloc + split.path.strip("/"):
        raise SettingsError(f"{shown(address)!r} names no host and no bucket; write {split.scheme}://, the host or "
                            "bucket, and the path")
    return split.scheme + address[len(split.scheme):]


def _local(address: str, split: SplitResult) -> str:
    """The path that a file: URL means."""
    path = unquote(split.path)
    if split.netloc not in ("", "localhost") or not path or "\0" in path:
        raise SettingsError(f"{shown(address)!r} is no file of this computer; write file:///path, or the path alone")
    return path


if __name__ == "__main__":
    raise SystemExit("vir.addresses is a part of the library; the program is vir-train")
