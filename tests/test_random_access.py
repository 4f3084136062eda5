"""Parts of files, local and on a server: the right bytes, by few and small requests."""

import io
import os
import tarfile

import numpy as np
import pytest

from support.http_server import HttpServer
from vir import files
from vir.data.random_access import LocalFile, RemoteFile, read_exactly
from vir.data.stores.http import HttpStore
from vir.data.tar import opened
from vir.data.tar_samples import read_samples


def tar_of(sizes, labels=("cls", "json"), first="jpg"):
    """The bytes of a tar with an image of each size, written by Python's tarfile."""
    file = io.BytesIO()
    contents = {"cls": b"7", "json": b'{"label": 7, "filename": "a.JPEG"}'}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, size in enumerate(sizes):
            members = [("jpg", bytes(size)), *((label, contents[label]) for label in labels)]
            for ending, data in sorted(members, key=lambda member: member[0] != first):
                info = tarfile.TarInfo(f"n01/{number:06d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture()
def server():
    with HttpServer({}) as server:
        yield server


def remote(server, content):
    server.content["/a.tar"] = content
    store, url = HttpStore(10.0), server.url("/a.tar")
    file = RemoteFile(store, url, store.stat(url))
    server.forget()
    return file


def same(tmp_path, file, content):
    """Whether the samples are those of the same tar on the disk."""
    (tmp_path / "a.tar").write_bytes(content)
    with opened(tmp_path / "a.tar") as local:
        expected = list(read_samples(local, "a"))
    assert list(read_samples(file, "a")) == expected
    return len(expected)


# ---- the bytes

@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 50_001])
def test_any_part_is_that_of_the_content(server, size):
    content = np.random.default_rng(size).bytes(size)
    file = remote(server, content)
    assert file.size == size
    generator = np.random.default_rng(0)
    for _ in range(60):
        offset, length = int(generator.integers(0, size + 3)), int(generator.integers(0, 9000))
        assert file.pread(length, offset) == content[offset:offset + length]
    assert file.pread(10, size) == b"" and file.pread(size + 7, 0) == content


def test_a_local_file_is_read_again_after_a_failure(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"0123456789")
    failures = [OSError(5, "Input/output error")] * 2
    read = os.pread

    def fail_first(*arguments):
        if failures:
            raise failures.pop()
        return read(*arguments)

    monkeypatch.setattr(os, "pread", fail_first)
    monkeypatch.setattr(files, "RETRY_WAITS_S", (0.0, 0.0))
    with open(tmp_path / "a", "rb") as file:
        assert LocalFile(file.fileno()).pread(3, 4) == b"456" and failures == []
        failures += [OSError(5, "Input/output error")] * 4
        with pytest.raises(OSError, match="Input/output error"):
            LocalFile(file.fileno()).pread(3, 4)


def test_a_file_that_ends_too_early(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    with open(tmp_path / "a", "rb") as file:
        assert read_exactly(LocalFile(file.fileno()), 6, 4) == b"456789"
        with pytest.raises(EOFError, match="ends after 6 of 7 bytes"):
            read_exactly(LocalFile(file.fileno()), 7, 4)


# ---- the requests

@pytest.mark.parametrize("first", ["jpg", "cls", "json"])
def test_a_sample_of_a_large_image_is_one_small_request(server, tmp_path, first):
    content = tar_of([110_000] * 30, first=first)
    file = remote(server, content)
    assert same(tmp_path, file, content) == 30
    assert len(server.requests) <= 30 + 3
    assert server.bytes <= 4096 * (len(server.requests) + 1) < len(content) / 20


def test_small_images_come_many_at_a_time(server, tmp_path):
    content = tar_of([3000] * 2000, labels=("cls",))
    file = remote(server, content)
    assert same(tmp_path, file, content) == 2000
    assert len(server.requests) <= len(content) / (1 << 20) + 12
    assert server.bytes <= 1.01 * len(content)


@pytest.mark.parametrize("size, is_skipped", [(12_000, False), (20_000, True)])
def test_from_some_size_on_images_are_passed_over(server, tmp_path, size, is_skipped):
    content = tar_of([size] * 60)
    file = remote(server, content)
    assert same(tmp_path, file, content) == 60
    assert (len(server.requests) > 55, server.bytes < len(content) / 2) == (is_skipped, is_skipped)


def test_large_images_after_small_ones_are_passed_over_again(server, tmp_path):
    content = tar_of([2000] * 1500 + [200_000] * 40, labels=("cls",))
    file = remote(server, content)
    same(tmp_path, file, content)
    large = 40 * 200_000
    assert server.bytes < len(content) - large + (2 << 20) + 40 * 4096
    assert len(server.requests) < 70


def test_another_object_in_its_place_is_told(server):
    file = remote(server, bytes(100_000))
    file.pread(512, 0)
    server.content["/a.tar"] = bytes(99_999) + b"1"
    with pytest.raises(Exception, match="changed on the server"):
        file.pread(512, 50_000)
