"""Samples that a run goes on without: read from a file of keys; each one's places are taken by another sample."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vir.data.reader import Reader
from vir.data.sources.folder import some
from vir.errors import SettingsError


@dataclass(frozen=True)
class Exclusion:
    """Which samples are never served, and which ones come in their places."""

    samples: np.ndarray  # [E] int64, ascending
    substitutes: np.ndarray  # [E] int64, none of them excluded

    def __len__(self) -> int:
        return len(self.samples)

    def holds(self, sample: int) -> bool:
        return len(self) > 0 and bool(self._found(np.array([sample]))[1][0])

    def applied(self, samples: np.ndarray) -> np.ndarray:
        """The samples [N] that are served for these [N]; as they are where none is excluded."""
        if not len(self):
            return samples
        places, is_excluded = self._found(samples)
        return np.where(is_excluded, self.substitutes[places], samples)

    def fingerprint(self, of_data: str) -> str:
        """Of the order: that of the data, and where samples are excluded of which ones."""
        if not len(self):
            return of_data
        return hashlib.sha256(of_data.encode() + self.samples.astype("<i8").tobytes()).hexdigest()

    def _found(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.minimum(np.searchsorted(self.samples, samples), len(self) - 1)
        return places, self.samples[places] == samples


NOTHING = Exclusion(np.empty(0, np.int64), np.empty(0, np.int64))


def read_exclusion(path: str, reader: Reader) -> Exclusion:
    """What a file of keys excludes of the reader's samples; NOTHING where no file is named.

    A key in each line; a # at its start or after a space or tab begins a comment, unless it belongs to a key.

    Raises:
        SettingsError: the file cannot be read or names no key, one that the reader has not, or all that it has.
    """
    if not path:
        return NOTHING
    lines = [_readings(line) for line in _lines(Path(path))]
    numbers = reader.find({key for readings in lines for key in readings})
    keys = {next((key for key in readings if key in numbers), readings[-1]) for readings in lines} - {""}
    if not keys:
        raise SettingsError(f"--data.exclude {path} names no sample; write the key of one into each line, or leave the "
                            "flag out")
    numbers = {key: number for key, number in numbers.items() if key in keys}
    if unknown := sorted(keys - numbers.keys()):
        raise SettingsError(f"--data.exclude {path} names {len(unknown)} of {len(keys)} keys that {reader.name} has "
                            f"not: {some(unknown)}; correct or remove them: keys are names of samples in the shards, "
                            f"such as {reader.key(0)}")
    if len(numbers) == len(reader):
        raise SettingsError(f"--data.exclude {path} names all {len(reader)} samples of {reader.name}; leave some to "
                            "train on")
    return exclude(np.array(sorted(numbers.values()), np.int64), reader)


def exclude(samples: np.ndarray, reader: Reader) -> Exclusion:
    """For each of the samples, [E] int64, ascending and not all, the first of reader.substitutes() that is none."""
    labels, ends = reader.labels, np.cumsum(reader.shard_sizes)
    is_left = np.ones(len(reader), bool)
    is_left[samples] = False
    left = np.flatnonzero(is_left)
    substitutes = np.empty_like(samples)
    for place, (sample, shard) in enumerate(zip(samples.tolist(), np.searchsorted(ends, samples, "right").tolist())):
        part = slice(int(ends[shard]) - reader.shard_sizes[shard], int(ends[shard]))
        alike = part.start + np.flatnonzero((labels[part] == labels[sample]) & is_left[part])
        among = alike if len(alike) else left
        substitutes[place] = among[np.searchsorted(among, sample) % len(among)]
    return Exclusion(samples, substitutes)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8").split("\n")  # keys may have what str.splitlines takes for an end
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--data.exclude {path} cannot be read: {getattr(error, 'strerror', None) or error}; give "
                            "a text file with the key of a sample in each line") from error


def _readings(line: str) -> list[str]:
    """The keys that a line may mean, the longest first: all of it, or what is before one # or another."""
    line = line.strip(" \t\r")
    return [line, *(line[:found.start()] for found in reversed(list(re.finditer(r"(?:^|[ \t]+)#", line))))]


if __name__ == "__main__":
    raise SystemExit("vir.data.exclusion is a part of the library; the program is vir-train")
