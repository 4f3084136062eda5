"""Converts ImageNet, or any labelled images, into WebDataset shards with an index.

    vir-convert --source SRC --split train --output shards --workers 8
    vir-convert --source SRC --split val --output shards --workers 8

SRC is one of

    an image folder        SRC/train/<class>/<image>, SRC/val/<class>/<image>; or SRC/<class>/<image> for one split
    the official archives  ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz in SRC;
                           they are read where they lie, nothing is unpacked
    Kaggle's layout        SRC/ILSVRC/Data/CLS-LOC/{train,val} and SRC/LOC_val_solution.csv
    WebDataset shards      SRC/train/*.tar, to cut them anew

The first command writes shards/train/imagenet1k-train-000000.tar ... with index.npy and manifest.json beside them. The
same command goes on after a kill, a full disk or a lost one; what was finished is not written again.
"""

import argparse
import re
import sys
from pathlib import Path

from vir import cli
from vir.data.convert import Settings, convert, dry_run
from vir.data.deal import SAMPLES_PER_SHARD, SEED
from vir.data.executors import Stopped
from vir.data.picture import CHECKS, ON_ERROR, TRANSCODES, PictureSettings
from vir.data.sidecars import KINDS, parse_kinds, write_sidecars
from vir.data.sources.folder import read_class_list
from vir.data.work_folder import finished_shards
from vir.errors import EXIT_STOPPED_BY_SIGNAL, SettingsError, VirError


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    with cli.stop_requests() as received:
        try:
            kinds = parse_kinds(args.also)
            act = dry_run if args.dry_run else convert
            print(act(args.source, args.split, args.output, _settings(args), workers=args.workers,
                      executor=args.executor, classes=read_class_list(args.classes) if args.classes else None,
                      is_stopping=lambda: bool(received)))
            written = [] if args.dry_run else write_sidecars(args.output / args.split, kinds)
        except VirError as error:
            return cli.tell(error, "vir-convert")
        except Stopped:
            finished = 0 if args.dry_run else finished_shards(args.output / args.split)
            kept = f"{finished:,} shards are finished and kept, the same command continues" if finished else \
                "no shard was finished"
            print(f"vir-convert: stopped by {received[0].name}; {kept}", file=sys.stderr)
            return EXIT_STOPPED_BY_SIGNAL
    if written:
        print(f"for {', '.join(kinds)}: {len(written):,} files written, {written[0].name}, ...")
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    if args.quality is not None and args.resize_short is None:
        raise SettingsError("--quality is that of images which --resize-short makes smaller; all others keep their "
                            "bytes: give both or none")
    pictures = PictureSettings(on_error=args.on_error, check=args.check, resize_short=args.resize_short,
                               transcode=args.transcode, **({} if args.quality is None else {"quality": args.quality}))
    return Settings(name=args.name, samples_per_shard=args.samples_per_shard, bytes_per_shard=args.bytes_per_shard,
                    seed=args.seed, pictures=pictures)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 500MB or 1.5GB")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vir-convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="where the images are: see above; JPEG, PNG or WebP")
    add("--split", required=True, help="which images of SOURCE, and folder in OUTPUT to write: train, val, ...")
    add("--output", type=Path, required=True, help="where the split folder will appear, once it is whole")
    add("--dry-run", action="store_true", help="say what would be written and in what time, measured on a few images")
    add("--classes", type=Path, help="file with the class names, one a line, in label order (default: as in the splits "
                                     "already in OUTPUT, else that of SOURCE: ImageNet's, or its sorted class folders)")
    add("--seed", type=int, default=SEED, help=f"of the shuffle over the whole split (default {SEED})")

    shards = parser.add_argument_group("shards")
    shards.add_argument("--name", default="imagenet1k", help="first part of the shards' names (default imagenet1k)")
    size = shards.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, metavar="N",
                      help=f"at most, spread evenly (default {SAMPLES_PER_SHARD}: about 110 MB)")
    size.add_argument("--bytes-per-shard", type=_bytes, metavar="SIZE",
                      help="about, spread evenly: 500MB; asks the size of every image first")
    shards.add_argument("--also", default="", metavar="READERS",
                        help=f"files for other readers too, separated by commas: {', '.join(KINDS)}")

    images = parser.add_argument_group("images", "without these flags image files go into the shards byte for byte")
    images.add_argument("--on-error", choices=ON_ERROR, default="fail",
                        help="a file that is no whole image stops the conversion (fail, default), is left out and "
                             "listed in the manifest (skip), or, where it can be, is written anew as an RGB JPEG of "
                             "quality 100, and so are CMYK JPEGs and PNGs named .JPEG (fix)")
    images.add_argument("--check", choices=CHECKS, default="header",
                        help="header (default): parse headers, decode what looks truncated; decode: decode all")
    images.add_argument("--resize-short", type=int, metavar="N",
                        help="scale images whose shorter side has more pixels down to N, as JPEG")
    images.add_argument("--quality", type=int, help="of those JPEGs (default 95)")
    images.add_argument("--transcode", choices=TRANSCODES,
                        help="progressive JPEGs as baseline ones, without loss: they decode twice as fast; needs "
                             "libjpeg-turbo's jpegtran")

    work = parser.add_argument_group("work", "the shards' bytes do not depend on these")
    work.add_argument("--workers", type=int, default=8, help="processes, or jobs (default 8)")
    work.add_argument("--executor", default="local", metavar="WHERE",
                      help="local (default), dask://HOST:PORT or slurm; SOURCE and OUTPUT are then paths on all nodes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
