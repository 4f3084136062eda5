"""The cores that decode and augment images as fast as the GPUs take them, and what is read meanwhile.

The rates are our own, per CPU second of the loader's processes and of the one that takes their batches, measured by
tools/benchmark_loader.py pixels on two virtual cores of an AMD EPYC (AVX-512), as in
docs/results/2026-11-30-loader-pixels.json. Reading from the page cache, checksums, decoding, the crop's resize and
making batches are in them; a network is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from vir.config import AugmentConfig, check_positive
from vir.errors import SettingsError
from vir.planning.traffic import Traffic

CROP_AND_FLIP, RANDAUGMENT = "crop, flip", "RandAugment"

RATES = {
    (CROP_AND_FLIP, "simplejpeg"): 720.0,
    (CROP_AND_FLIP, "nvimgcodec"): 737.0,
    (RANDAUGMENT, "simplejpeg"): 399.0,
    (RANDAUGMENT, "nvimgcodec"): 439.0,
}
"""Images per CPU second by augmentation and decoder: that of one or of two loader processes, whichever is less."""

DECODER = "simplejpeg"
"""That of an installation without extras."""

IMAGE_BYTES = 72_000
"""Of a JPEG of those measurements, on average, of 500 x 375 pixels."""

MEASURED_SIZE = 224
"""The side of what its images were cropped to."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What the loader of a node has to do."""

    images_per_second: float
    """Of a node."""
    augmentation: str
    """The measured one that is taken: crop, flip or RandAugment."""
    is_measured: bool
    """Whether the settings are those that were measured; else their nearest are taken."""
    decoder: str
    rate: float
    """Images per CPU second, as measured."""
    cores: float
    """Of a node, if an image takes as long as one of those that were measured."""
    cores_at_most: float
    """Of a node, if all of that time grows with the bytes of an image, or with the pixels of its crop, whichever grows
    more. JPEGs of 109 kB with RandAugment took 1.16 times as long (2026-11-30-loader-latency.json), not 1.5 times."""
    bytes_per_second: float
    """Of images, decoded on a node; from the shards' server or disk, or from the node's cache."""
    fetched_bytes_per_second: float
    """Over the network, by a node in the first epoch."""
    later_bytes_per_second: float
    """Over the network, by a node in the second epoch."""
    reads_per_second: float
    """Requests of a node to the server in the first epoch, at most: of whole shards, and of single images."""


def augmentation(augment: AugmentConfig) -> tuple[str, bool]:
    """The measured augmentation that takes about as long per image, and whether it is just the measured one.

    What auto_augment names decides: without it crop and flip, with any of timm's policies RandAugment of the default
    settings, though a policy of other operations or more of them takes another time. Colour jitter, which acts only
    without auto_augment, comes on top of crop and flip and was not measured. Erasing and mixing are done on the GPU.
    """
    usual = AugmentConfig()
    if augment.auto_augment is None:
        name, same_policy = CROP_AND_FLIP, augment.color_jitter == 0
    else:
        name, same_policy = RANDAUGMENT, augment.auto_augment == usual.auto_augment
    return name, same_policy and (augment.scale, augment.ratio, augment.interpolation) == (
        usual.scale, usual.ratio, usual.interpolation)


def loading(images_per_second: float, *, nodes: int, image_bytes: float, augment: AugmentConfig,
            traffic: Traffic | None = None, img_size: int = MEASURED_SIZE, decoder: str = DECODER) -> Loading:
    """What loading asks of a node where the cluster takes images at this rate.

    Args:
        images_per_second: of all nodes together.
        image_bytes: of a file of the data set, on average; ImageNet's have 110 kB.
        traffic: of shards on a server; None: images on a disk, each one read from there in every epoch.
        img_size: the side of what an image is cropped to.
        decoder: simplejpeg, or nvimgcodec, which the extra `fast` installs.

    Raises:
        SettingsError: numbers that are not positive and finite, or a decoder that was not measured.
    """
    check_positive({"images per second": images_per_second, "--nodes": nodes, "bytes per image": image_bytes,
                    "--model.img_size": img_size})
    name, is_measured = augmentation(augment)
    if (name, decoder) not in RATES:
        raise SettingsError(f"no rate of the decoder {decoder} was measured, only of "
                            f"{' and '.join(sorted({known for _, known in RATES}))}")
    per_node, rate = images_per_second / nodes, RATES[name, decoder]
    more = max(1.0, image_bytes / IMAGE_BYTES, (img_size / MEASURED_SIZE) ** 2)
    first = image_bytes if traffic is None else traffic.bytes_per_image
    later = image_bytes if traffic is None else traffic.later_bytes_per_image
    return Loading(
        images_per_second=per_node, augmentation=name, is_measured=is_measured and img_size == MEASURED_SIZE,
        decoder=decoder, rate=rate, cores=per_node / rate, cores_at_most=per_node / rate * more,
        bytes_per_second=per_node * image_bytes, fetched_bytes_per_second=per_node * first,
        later_bytes_per_second=per_node * later,
        reads_per_second=per_node * (1.0 if traffic is None else traffic.reads_per_image))


if __name__ == "__main__":
    raise SystemExit("vir.planning.loading is a part of the library; the program is vir-plan")
