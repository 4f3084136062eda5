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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vir.errors import DataError
from vir.files import open_regular, read_regular, replace_text, replacing, sha256

FORMAT_VERSION = 2
"""2: a shard may be without sha256; `fixed`, `conversion` and a checksum of its own in the manifest."""

MANIFEST = "manifest.json"
INDEX = "index.npy"
PARTIAL = ".partial"
"""The end of the folder name of a split while it is being written."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Of a data set or a split: a part of file names."""

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

MAX_MANIFEST_BYTES = 1 << 27
"""Of a manifest: no JSON of this size fills the memory that reads it."""

MAX_SHARDS = 1 << 18
"""Of a split: they take 50 MB of the manifest."""

MAX_INDEX_KEY_BYTES = 4096
"""Of an index that is read: no path is longer."""

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
    format_version: int = FORMAT_VERSION

    @property
    def is_converted(self) -> bool:
        """Whether vir-convert wrote the shards."""
        return self.conversion is not None or self.format_version < 2  # 1 had none made elsewhere

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
    """Writes one tar at `path`, which must not exist. It is not forced to disk: vir.files.replacing does that.

    Returns:
        Its entry in the manifest, and its rows of the index (field "shard" is 0; write_split sets it).
    """
    rows, keys = [], []
    with open(path, "xb", buffering=1 << 20) as file:
        tar = _TarWriter(file)
        for sample in samples:
            offset = tar.add(f"{sample.key}.{sample.extension}", sample.data)
            tar.add(f"{sample.key}.cls", str(sample.label).encode())
            about = sample_json(sample.filename, sample.label, sample.width, sample.height)
            tar.add(f"{sample.key}.json", about)
            rows.append((0, sample.label, offset, len(sample.data), zlib.crc32(sample.data), sample.width,
                         sample.height, b""))
            keys.append(sample.key.encode("utf-8"))
        tar.end()
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
    with replacing(folder / INDEX) as path:
        write_index(path, [rows for _, rows in shards])
    manifest = SplitManifest(name=name, split=split, classes=tuple(classes), shards=tuple(info for info, _ in shards),
                             index_sha256=sha256(folder / INDEX), seed=seed, samples_per_shard=samples_per_shard,
                             skipped=tuple(skipped), fixed=tuple(fixed), conversion=conversion)
    content = {**asdict(manifest), "num_samples": manifest.num_samples, "fingerprint": manifest.fingerprint}
    content["manifest_sha256"] = _digest(content)
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    if len(text) > MAX_MANIFEST_BYTES:  # json.dumps writes ASCII
        raise DataError(f"the manifest of {folder} would have {len(text):,} bytes, over {MAX_MANIFEST_BYTES:,}; "
                        f"{len(skipped):,} files were left out and {len(fixed):,} mended; mend or remove them in the "
                        "source, and convert it in parts")
    replace_text(folder / MANIFEST, text)
    return manifest


def _digest(content: Mapping[str, Any]) -> str:
    """Of all that a manifest says, but for this digest itself: a flipped bit anywhere in it is seen."""
    rest = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def write_index(path: Path, parts: Sequence[np.ndarray]) -> None:
    """Writes the index of shards whose rows are given in order; field "shard" becomes their position."""
    dtype = index_dtype(max((rows.dtype["key"].itemsize for rows in parts), default=1))
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (sum(map(len, parts)),)}
    with open(path, "wb") as file:  # as np.save writes it, without a second copy of all rows
        np.lib.format.write_array_header_1_0(file, about)
        for number, rows in enumerate(parts):
            part = np.empty(len(rows), dtype)
            part[:] = rows
            part["shard"] = number
            file.write(part.tobytes())


def read_manifest(folder: Path) -> SplitManifest:
    """The manifest of a split folder; the shards themselves are not read.

    Raises:
        DataError: no such folder, not converted, broken, or written by a newer version.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        data = read_regular(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(_why_no_manifest(folder)) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, path: str) -> SplitManifest:
    """What manifest.json says. Raises DataError as read_manifest, with `path` as the file's name."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); copy the split again or convert it again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise DataError(f"{path} is no manifest of shards (format_version is {str(version)[:50]}); convert the split "
                        "again")
    if version > FORMAT_VERSION:
        raise DataError(f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}: "
                        f"update vir-at-scale, or convert the split again")
    try:
        manifest = _manifest_of(content)
        whole = (content["num_samples"], content["fingerprint"]) == (manifest.num_samples, manifest.fingerprint)
        if version > 1 or "manifest_sha256" in content:
            whole = whole and content["manifest_sha256"] == _digest(content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); convert the split again") from error
    names = [shard.name for shard in manifest.shards]
    if outside := [name for name in names if name != os.path.basename(name) or name in (os.curdir, os.pardir)]:
        raise DataError(f"{path} names shards outside its folder: {outside[0]!r}")
    (name, count), = Counter(names).most_common(1) or [("", 0)]
    if count > 1:
        raise DataError(f"{path} names the shard {name!r} {count} times; copy the split again or convert it again")
    if not whole:
        raise DataError(f"{path} contradicts itself (sample count, fingerprint or checksum): it was edited or is "
                        f"damaged; copy the split again or convert it again")
    return manifest


def read_index(folder: Path) -> np.ndarray:
    """The index of a split folder as a read-only memory map, INDEX_FIELDS and "key".

    Raises:
        DataError: it cannot be read, or is no index. Whether what it says can be true, vir.data.reader checks.
    """
    path = Path(folder) / INDEX
    again = "copy the split again or convert it again"
    try:
        with open(open_regular(path), "rb") as file:
            shape, dtype = _npy_header(file)
            if not _is_index(shape, dtype):
                raise DataError(f"{path} is no index of shards (its type is {str(dtype)[:200]}, its shape "
                                f"{str(shape)[:50]}); {again}")
            if (size := file.tell() + shape[0] * dtype.itemsize) != (found := os.fstat(file.fileno()).st_size):
                raise DataError(f"{path} is damaged (it has {found} bytes, its header asks for {size}); {again}")
            index = np.memmap(file, dtype, "r", file.tell(), shape)
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}; {again}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {again}") from error
    except ValueError as error:
        why = " ".join(str(error).split())[:200]  # some of numpy's have many lines
        raise DataError(f"{path} is damaged ({why}); {again}") from error
    return index.view(np.ndarray)  # rows of a plain array cost half of a memmap's


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array that np.save has written; the file is left at its data. Raises ValueError."""
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"a header of version {version[0]}.{version[1]}")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        raise
    except Exception as error:  # the header is an expression: its parsers raise nearly anything on a broken one
        raise ValueError(f"a broken header: {type(error).__name__}") from error
    return shape, dtype


def _is_index(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    names = [name for name, _ in INDEX_FIELDS] + ["key"]
    if len(shape) != 1 or not 0 <= shape[0] < 1 << 50 or dtype.names is None or list(dtype.names) != names:
        return False
    return dtype["key"].itemsize <= MAX_INDEX_KEY_BYTES and dtype == index_dtype(dtype["key"].itemsize)


class _TarWriter:
    """Writes members one after another, and knows the size and the sha256 of what it has written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Returns where the data begins."""
        self._write(member_header(name, len(data)))
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
    if wrong := [key for key in ("classes", "shards", "skipped") if not isinstance(content[key], list)]:
        raise ValueError(f"{wrong[0]} is no list")
    if not content["shards"]:
        raise ValueError("it names no shards")
    manifest = SplitManifest(
        name=content["name"], split=content["split"], classes=tuple(content["classes"]),
        shards=tuple(ShardInfo(**shard) for shard in content["shards"]), index_sha256=content["index_sha256"],
        seed=content["seed"], samples_per_shard=content["samples_per_shard"],
        skipped=tuple(SkippedFile(**file) for file in content["skipped"]),
        fixed=tuple(SkippedFile(**file) for file in content.get("fixed", ())),
        conversion=content.get("conversion"), format_version=content["format_version"])
    texts = [manifest.name, manifest.split, manifest.index_sha256, *manifest.classes,
             *(shard.name for shard in manifest.shards)]
    if wrong := [value for value in texts if not _is_text(value)]:
        raise ValueError(f"{str(wrong[0])[:100]!r} where a name belongs")
    counts = [number for shard in manifest.shards for number in (shard.num_samples, shard.bytes)]
    for number in [manifest.samples_per_shard, *counts]:
        if type(number) is not int or not 0 <= number < 1 << 62:
            raise ValueError(f"{str(number)[:100]} where a count belongs")
    for shard in manifest.shards:
        if shard.sha256 is not None and not (isinstance(shard.sha256, str) and _SHA256.fullmatch(shard.sha256)):
            raise ValueError(f"{str(shard.sha256)[:100]!r} where a sha256 belongs")
    if not isinstance(manifest.conversion, dict | None):
        raise ValueError("conversion is neither an object nor null")
    return manifest


def _is_text(value: object) -> bool:
    """Whether it can be a name: JSON can say NULs and halves of characters, file systems cannot."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        return bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def count_of(shards: int) -> str:
    """For messages: "1 shard", "1,282 shards"."""
    return f"{shards:,} {'shard' if shards == 1 else 'shards'}"


def index_dtype(key_bytes: int) -> np.dtype:
    return np.dtype(INDEX_FIELDS + [("key", f"S{key_bytes}")])


def member_header(name: str, size: int) -> bytes:
    """What comes before a file of `size` bytes in a shard: headers as of webdataset's TarWriter with no owner and time
    0, so that the bytes depend on names and content alone."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o444
    return header.tobuf(tarfile.PAX_FORMAT)


def sample_json(filename: str, label: int, width: int, height: int) -> bytes:
    """The fields of timm's imagenet-1k-wds."""
    return json.dumps({"filename": filename, "height": height, "label": label, "width": width}).encode()


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
        archives = convert.format(shlex.quote(str(folder)), "SPLIT")
        holds = f"{folder} holds {count} ({tars[0]}{', ...' if tars[1:] else ''}) but no {MANIFEST}: "
        if any(name.startswith("ILSVRC2012_") for name in tars):
            return f"{holds}archives of ImageNet; convert them: {archives}"
        return (f"{holds}shards or archives made elsewhere; make the index of WebDataset shards: {index}; convert "
                f"other archives: {archives}")
    if folders:
        return (f"{folder} has no {MANIFEST}; it looks like an ImageNet folder of {len(folders)} class folders "
                f"({folders[0]}, ...): convert it first: {convert.format(folder.parent, folder.name)}")
    return f"{folder} has no {MANIFEST}: it is no converted split; convert first: {convert.format('SRC', folder.name)}"


if __name__ == "__main__":
    raise SystemExit("vir.data.shards is a part of the library; the program is vir-convert")
