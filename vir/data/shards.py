"""A split on disk: WebDataset tars, an index of their samples, and a manifest. Writes all; reads manifest and index.

    OUTPUT/SPLIT/NAME-SPLIT-000000.tar   members key.jpg (or .png, .webp), key.cls (decimal text), key.json
    OUTPUT/SPLIT/index.npy               one row per sample in shard order, INDEX_FIELDS; read by memory map
    OUTPUT/SPLIT/manifest.json           SplitManifest

Every byte depends only on the samples and their order, not on time, user or host.
"""

import hashlib
import json
import os
import re
import shlex
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vir.errors import DataError
from vir.files import read_regular, replace_text, replacing, sha256

FORMAT_VERSION = 2
"""2: a shard may be without sha256; `fixed` and `conversion` in the manifest."""

MANIFEST = "manifest.json"
INDEX = "index.npy"
PARTIAL = ".partial"
"""The end of the folder name of a split while it is being written."""

INDEX_FIELDS = [
    ("shard", "<i4"),   # position in the manifest's list
    ("label", "<i4"),
    ("offset", "<i8"),  # of the image's first byte in the shard
    ("size", "<i8"),    # of the image, in bytes
    ("crc32", "<u4"),   # of the image
    ("width", "<i4"),   # pixels
    ("height", "<i4"),
]
"""A last field, "key", follows: its type is S{n}, UTF-8, where n is the length of the longest key in the split."""

MAX_MANIFEST_BYTES = 1 << 28
"""Of a manifest that is read: a million shards take less."""


_SHA256 = re.compile("[0-9a-f]{64}")


class ShardSample(NamedTuple):
    """An image on its way into a shard."""

    key: str
    data: bytes
    extension: str
    width: int
    height: int
    label: int
    filename: str


@dataclass(frozen=True)
class ShardInfo:
    name: str
    num_samples: int
    bytes: int
    sha256: str | None
    """None: the images were not read when the index was made. Then their crc32 is 0 and is not checked, and width and
    height are 0."""


@dataclass(frozen=True)
class SkippedFile:
    """A file of the source that is not in the shards as it is."""

    filename: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """What a split folder holds."""

    name: str
    split: str
    classes: tuple[str, ...]
    """The position is the label."""
    shards: tuple[ShardInfo, ...]
    index_sha256: str
    seed: int
    """The seed of the shuffle at conversion."""
    samples_per_shard: int
    """The setting of the conversion: the most samples that a shard may hold."""
    skipped: tuple[SkippedFile, ...] = ()
    """Source files that were left out because they are not complete images."""
    fixed: tuple[SkippedFile, ...] = ()
    """Source files that were written anew, as RGB JPEGs."""
    conversion: Mapping[str, Any] | None = None
    """What the bytes depend on: settings and source of the conversion. None for shards made elsewhere."""

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """sha256 of the shards' hashes, their sample counts and the class list; checkpoints keep it to know their data.

        Where shards have no hash, their names and sizes and the hash of the index stand for it.
        """
        content: list[Any] = [[[shard.sha256, shard.num_samples] for shard in self.shards], list(self.classes)]
        if any(shard.sha256 is None for shard in self.shards):
            content += [[[shard.name, shard.bytes] for shard in self.shards], self.index_sha256]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def write_shard(path: Path, samples: Iterable[ShardSample]) -> tuple[ShardInfo, np.ndarray]:
    """Writes one tar at `path`, which must not exist, and forces it to disk.

    Returns:
        Its entry in the manifest, and its rows of the index (field "shard" is 0; write_split sets it).
    """
    rows, keys = [], []
    with open(path, "xb", buffering=1 << 20) as file:
        tar = _TarWriter(file)
        for sample in samples:
            offset = tar.add(f"{sample.key}.{sample.extension}", sample.data)
            tar.add(f"{sample.key}.cls", str(sample.label).encode())
            tar.add(f"{sample.key}.json", _sample_json(sample))
            rows.append((0, sample.label, offset, len(sample.data), zlib.crc32(sample.data), sample.width,
                         sample.height, b""))
            keys.append(sample.key.encode("utf-8"))
        tar.end()
        file.flush()
        os.fsync(file.fileno())
    index = np.array(rows, dtype=index_dtype(max(map(len, keys), default=1)))
    index["key"] = keys
    return ShardInfo(path.name, len(rows), tar.size, tar.sha256.hexdigest()), index


def write_split(folder: Path, shards: Sequence[tuple[ShardInfo, np.ndarray]], *, name: str, split: str,
                classes: Sequence[str], seed: int, samples_per_shard: int,
                skipped: Sequence[SkippedFile] = (), fixed: Sequence[SkippedFile] = (),
                conversion: Mapping[str, Any] | None = None) -> SplitManifest:
    """Writes index and manifest beside the shards in `folder`, the manifest last.

    Args:
        shards: the results of write_shard, in order.
    """
    longest = max((rows.dtype["key"].itemsize for _, rows in shards), default=1)
    index = np.empty(sum(len(rows) for _, rows in shards), dtype=index_dtype(longest))
    start = 0
    for number, (_, rows) in enumerate(shards):
        part = index[start:start + len(rows)]
        part[:] = rows
        part["shard"] = number
        start += len(rows)
    with replacing(folder / INDEX) as path, open(path, "wb") as file:
        np.save(file, index, allow_pickle=False)
    manifest = SplitManifest(name=name, split=split, classes=tuple(classes), shards=tuple(info for info, _ in shards),
                             index_sha256=sha256(folder / INDEX), seed=seed, samples_per_shard=samples_per_shard,
                             skipped=tuple(skipped), fixed=tuple(fixed), conversion=conversion)
    content = {"format_version": FORMAT_VERSION, **asdict(manifest), "num_samples": manifest.num_samples,
               "fingerprint": manifest.fingerprint}
    replace_text(folder / MANIFEST, json.dumps(content, indent=1, sort_keys=True) + "\n")
    return manifest


def read_manifest(folder: Path) -> SplitManifest:
    """The manifest of a split folder; the shards themselves are not read.

    Raises:
        DataError: no such folder, not converted, broken, or written by a newer version.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        content = json.loads(read_regular(path, MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(_why_no_manifest(folder)) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); copy the split again or convert it again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or version < 1:
        raise DataError(f"{path} is no manifest of shards (format_version is {version!r}); convert the split again")
    if version > FORMAT_VERSION:
        raise DataError(f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}: "
                        f"update vir-at-scale, or convert the split again")
    try:
        manifest = _manifest_of(content)
        whole = (content["num_samples"], content["fingerprint"]) == (manifest.num_samples, manifest.fingerprint)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); convert the split again") from error
    if not whole:
        raise DataError(f"{path} contradicts itself (sample count or fingerprint): it was edited or is damaged; "
                        f"copy the split again or convert it again")
    if outside := [shard.name for shard in manifest.shards if shard.name != os.path.basename(shard.name)]:
        raise DataError(f"{path} names shards outside its folder: {outside[0]!r}")
    return manifest


def read_index(folder: Path) -> np.ndarray:
    """The index of a split folder as a read-only memory map, INDEX_FIELDS and "key"."""
    path = Path(folder) / INDEX
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}; copy the split again or convert it again") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); copy the split again or convert it again") from error
    names = [name for name, _ in INDEX_FIELDS] + ["key"]
    if index.ndim != 1 or index.dtype.names is None or list(index.dtype.names) != names or \
            index.dtype != index_dtype(index.dtype["key"].itemsize):
        raise DataError(f"{path} is no index of shards (its type is {index.dtype}); convert the split again")
    return index.view(np.ndarray)  # rows of a plain array cost half of a memmap's


class _TarWriter:
    """Writes members one after another, and knows the size and the sha256 of what it has written.

    The headers are those of webdataset's TarWriter with no owner and time 0, so that the bytes depend on names and
    content alone.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Returns where the data begins."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(data), 0o444
        self._write(header.tobuf(tarfile.PAX_FORMAT))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def end(self) -> None:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))

    def _write(self, block: bytes) -> None:
        self.sha256.update(block)
        self.size += len(block)
        self.file.write(block)


def _manifest_of(content: dict[str, Any]) -> SplitManifest:
    """Raises KeyError, TypeError or ValueError where the content is not what write_split writes."""
    manifest = SplitManifest(
        name=content["name"], split=content["split"], classes=tuple(content["classes"]),
        shards=tuple(ShardInfo(**shard) for shard in content["shards"]), index_sha256=content["index_sha256"],
        seed=content["seed"], samples_per_shard=content["samples_per_shard"],
        skipped=tuple(SkippedFile(**file) for file in content["skipped"]),
        fixed=tuple(SkippedFile(**file) for file in content.get("fixed", ())),
        conversion=content.get("conversion"))
    texts = [manifest.name, manifest.split, manifest.index_sha256, *manifest.classes,
             *(shard.name for shard in manifest.shards)]
    if wrong := [value for value in texts if not isinstance(value, str) or "\0" in value or not value]:
        raise ValueError(f"{wrong[0]!r} where a name belongs")
    for shard in manifest.shards:
        for number in (shard.num_samples, shard.bytes):
            if type(number) is not int or not 0 <= number < 1 << 62:
                raise ValueError(f"{number!r} where a count belongs")
        if shard.sha256 is not None and not (isinstance(shard.sha256, str) and _SHA256.fullmatch(shard.sha256)):
            raise ValueError(f"{shard.sha256!r} where a sha256 belongs")
    if not isinstance(manifest.conversion, dict | None):
        raise ValueError(f"conversion is {manifest.conversion!r}")
    return manifest


def index_dtype(key_bytes: int) -> np.dtype:
    return np.dtype(INDEX_FIELDS + [("key", f"S{key_bytes}")])


def _sample_json(sample: ShardSample) -> bytes:
    """The fields of timm's imagenet-1k-wds."""
    return json.dumps({"filename": sample.filename, "height": sample.height, "label": sample.label,
                       "width": sample.width}).encode()


def _why_no_manifest(folder: Path) -> str:
    convert = "vir-convert --source {} --split {} --output SHARDS"
    if folder.is_file():
        return f"{folder} is a file; give the folder of a converted split; convert first: " + \
            convert.format('SRC', 'SPLIT')
    if not folder.is_dir():
        partial = folder.with_name(folder.name + PARTIAL)
        unfinished = f"; {partial} is there: its conversion is running or was interrupted" if partial.is_dir() else ""
        return f"no such folder: {folder}{unfinished or '; convert first: ' + convert.format('SRC', folder.name)}"
    try:
        found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        return f"cannot list {folder}: {error.strerror}"
    folders = [name for name in found if (folder / name).is_dir()]
    if converted := [name for name in folders if (folder / name / MANIFEST).is_file()]:
        return f"{folder} has no {MANIFEST}, {folder / converted[0]} has: give the folder of one split"
    if INDEX in found:
        return f"{folder} has an {INDEX} but no {MANIFEST}; copy the split again or convert it again"
    # An archive that was unpacked beside itself is none of them.
    if tars := [name for name in found if name.endswith((".tar", ".tar.gz", ".tgz")) and name not in folders
                and name.split(".")[0] not in folders]:
        count = "1 tar file" if len(tars) == 1 else f"{len(tars):,} tar files"
        plain = [name for name in tars if name.endswith(".tar")]
        index = (f"vir-index {shlex.quote(str(folder))}" if plain else
                 "they are compressed: unpack them (gunzip) to plain tars first")
        return (f"{folder} holds {count} ({tars[0]}{', ...' if tars[1:] else ''}) but no {MANIFEST}: shards or "
                f"archives made elsewhere; make the index of WebDataset shards: {index}; convert other archives: "
                f"{convert.format(shlex.quote(str(folder)), folder.name)}")
    if folders:
        return (f"{folder} has no {MANIFEST}; it looks like an ImageNet folder of {len(folders)} class folders "
                f"({folders[0]}, ...): convert it first: {convert.format(folder.parent, folder.name)}")
    return f"{folder} has no {MANIFEST}: it is no converted split; convert first: {convert.format('SRC', folder.name)}"


if __name__ == "__main__":
    raise SystemExit("vir.data.shards is a part of the library; the program is vir-convert")
