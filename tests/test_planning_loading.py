"""Cores and bytes that loading needs, with rates that are those of our own measurement."""

import json
from pathlib import Path

import pytest

from vir.benchmarks.loader import AUGMENTATIONS
from vir.config import AugmentConfig
from vir.errors import SettingsError
from vir.planning.loading import CROP_AND_FLIP, IMAGE_BYTES, RANDAUGMENT, RATES, augmentation, loading
from vir.planning.traffic import simulate

RESULTS = Path(__file__).resolve().parent.parent / "docs/results"


def table(name):
    content = json.loads((RESULTS / name).read_text())
    return content["title"], [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]


def test_rates_are_the_measured_ones():
    title, rows = table("2026-11-30-loader-pixels.json")
    measured = {}
    for row in rows:
        if row["loader"].startswith("ours, "):
            key = row["augmentation"], row["loader"].removeprefix("ours, ")
            measured.setdefault(key, []).append(float(row["images per CPU second"]))
    assert RATES == {key: min(rates) for key, rates in measured.items()}
    assert f"500 x 375 pixels and {IMAGE_BYTES / 1000:.0f} KB" in title


@pytest.mark.parametrize("workers", [1, 2])
def test_larger_files_take_a_time_between_the_two_that_are_told(workers):
    """Images per second of so many processes, each with a core, measured on files of 109 KB."""
    title, rows = table("2026-11-30-loader-latency.json")
    assert "109 KB" in title
    measured, = (float(row["images/s (least to most)"].split()[0]) for row in rows
                 if (row["loader"], row["workers"], row["ms a read"]) == ("shards", str(workers), "0"))
    told = loading(measured, nodes=1, image_bytes=109_000, augment=AugmentConfig(), decoder="nvimgcodec")
    assert told.cores <= workers <= told.cores_at_most


def test_each_measured_augmentation_is_found_for_its_settings():
    for name, augment in AUGMENTATIONS.items():
        assert augmentation(augment) == (name, True)


@pytest.mark.parametrize("augment, nearest", [
    (AugmentConfig(auto_augment=None), CROP_AND_FLIP),  # with colour jitter
    (AugmentConfig(auto_augment="augmix-m3"), RANDAUGMENT),
    (AugmentConfig(interpolation="bicubic"), RANDAUGMENT),
    (AugmentConfig(auto_augment=None, color_jitter=0.0, scale=(1, 1)), CROP_AND_FLIP)])
def test_other_augmentations_take_the_nearest_and_say_so(augment, nearest):
    assert augmentation(augment) == (nearest, False)


def test_what_gpus_do_does_not_matter():
    assert augmentation(AugmentConfig(reprob=0.0, mixup=0.0, cutmix=0.0, hflip=0.0)) == (RANDAUGMENT, True)


def test_cores_and_bytes_of_a_node():
    found = loading(399.0 * 64, nodes=8, image_bytes=2 * IMAGE_BYTES, augment=AugmentConfig())
    assert (found.images_per_second, found.cores, found.cores_at_most) == (399.0 * 8, 8.0, 16.0)
    assert found.bytes_per_second == found.fetched_bytes_per_second == found.later_bytes_per_second
    assert found.bytes_per_second == 399.0 * 8 * 2 * IMAGE_BYTES
    assert found.reads_per_second == 399.0 * 8 and found.is_measured
    small = loading(399.0, nodes=1, image_bytes=IMAGE_BYTES // 2, augment=AugmentConfig(), img_size=448)
    assert (small.cores, small.cores_at_most, small.is_measured) == (1.0, 4.0, False)


def test_from_a_server_a_node_fetches_what_the_simulation_says():
    sizes = [100] * 40
    arguments = {"nodes": 2, "global_batch_size": 50, "lanes": 4, "window": 60}
    cached = simulate(sizes, [100_000] * 40, cache_bytes=8_000_000, **arguments)
    found = loading(2000.0, nodes=2, image_bytes=1000, augment=AugmentConfig(), traffic=cached)
    seconds = 4000 / 2000.0  # of an epoch
    assert found.fetched_bytes_per_second * seconds == pytest.approx(cached.first_epoch.bytes_per_node)
    assert found.later_bytes_per_second * seconds == pytest.approx(cached.later_epoch.bytes_per_node)
    downloads = cached.first_epoch.downloads_per_shard * 40 / 2
    assert found.reads_per_second * seconds == pytest.approx(downloads + cached.first_epoch.in_parts * 2000)
    without = loading(2000.0, nodes=2, image_bytes=1000, augment=AugmentConfig(),
                      traffic=simulate(sizes, [100_000] * 40, cache_bytes=None, **arguments))
    assert without.reads_per_second == without.images_per_second == 1000.0
    assert without.fetched_bytes_per_second == without.bytes_per_second


@pytest.mark.parametrize("change, message", [
    ({"images_per_second": 0.0}, "images per second must be positive and finite, got 0"),
    ({"image_bytes": float("nan")}, "bytes per image must be positive and finite, got nan"),
    ({"decoder": "pillow"}, "no rate of the decoder pillow was measured, only of nvimgcodec and simplejpeg")])
def test_numbers_that_cannot_be_are_told(change, message):
    arguments = {"images_per_second": 1.0, "nodes": 1, "image_bytes": 1.0, "augment": AugmentConfig()} | change
    with pytest.raises(SettingsError, match=message):
        loading(arguments.pop("images_per_second"), **arguments)
