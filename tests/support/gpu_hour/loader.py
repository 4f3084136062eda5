"""How many images a second the loader alone delivers: read, decoded, augmented as the recipe of ViR-S says, pinned.

usage: python -m support.gpu_hour.loader FOLDER --workers 12 --images 4096 [options of vir.train]

FOLDER gets noisy JPEGs of ImageNet's usual 500 x 375 pixels, their shards, and result.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.launchers import ROOT
from vir.data.convert import convert
from vir.data.loader import train_batches
from vir.data.order import SampleOrder
from vir.data.reader import ShardReader
from vir.data.traffic import LANES, WINDOW
from vir.flags import parse
from vir.weights.spec import InputSpec

QUALITY = 90


def write_images(folder: Path, count: int) -> None:
    numbers = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / f"class{number % 2}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(numbers.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=QUALITY)


def measure(shards: Path, workers: int, count: int, options: list[str]) -> dict[str, float]:
    recipe = ROOT / "vir" / "recipes" / "vir_small_in1k.yaml"
    config = parse(["--config", str(recipe), "--data.train", str(shards), *options])
    reader, batch, side = ShardReader(shards), config.train.micro_batch_size, config.model.img_size or 224
    spec = InputSpec(size=(3, side, side), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
    warm, timed = 2 * workers, max(1, count // batch)
    batches = train_batches(
        reader, SampleOrder(0, reader.shard_sizes, LANES, WINDOW), config.augment, spec, seed=0,
        first_step=0, last_step=warm + timed, global_batch_size=batch, micro_batch_size=batch, rank=0, world_size=1,
        workers=workers, prefetch=config.data.prefetch,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for _ in range(warm):
        next(batches)
    began = time.perf_counter()
    for _ in range(timed):
        next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return {"workers": workers, "batch": batch, "images": timed * batch, "seconds": seconds,
            "images_per_second": timed * batch / seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--made", type=int, default=240)
    args, options = parser.parse_known_args()
    write_images(args.folder / "images", args.made)
    convert(args.folder / "images", "train", args.folder / "shards", workers=2)
    result = measure(args.folder / "shards" / "train", args.workers, args.images, options)
    (args.folder / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
