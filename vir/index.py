"""Makes the index and the manifest of WebDataset shards that were made elsewhere, so that they can be trained on.

    vir-index shards/train
    vir-index 'shards/imagenet1k-train-{0000..1023}.tar' --classes classes.txt --checksums --also timm,dali
    vir-index 's3://bucket/imagenet1k-train-{0000..1023}.tar'

The tars are only read; index.npy and manifest.json appear beside them. Those of tars on a server, or in several
folders, are kept in --index-dir, where training finds them; of such tars only the headers are asked for.

Each sample is an image (jpg, jpeg, png or webp) with its label (a number in cls, "label" in json, or a number or class
name in txt). The exit code is 130 after Ctrl-C; then nothing was written.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vir import cli
from vir.addresses import is_remote, parts
from vir.config import DataConfig, check_timeout
from vir.data.executors import Stopped
from vir.data.foreign import IndexSummary, find_paths, find_shards, index_shards, is_indexed
from vir.data.index_folder import Settings, default_index_dir, find_urls, make_index
from vir.data.sidecars import KINDS, parse_kinds, write_sidecars
from vir.data.sources.folder import read_class_list
from vir.errors import SettingsError, VirError


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    with cli.stop_requests() as received:
        try:
            kinds = parse_kinds(args.also)
            check_timeout("timeout", args.timeout)
            urls = _elsewhere(args, lambda: bool(received))
            if urls is not None and kinds:
                raise SettingsError("--also writes files beside shards in one local folder; leave it out, or download "
                                    "the shards")
            if urls is not None:
                print(_index_elsewhere(args, urls, lambda: bool(received)))
                return 0
            folder, names = find_shards(args.pattern)
            settings = (args.classes, args.split, args.name, args.checksums or None)
            if not kinds or any(value is not None for value in settings) or not is_indexed(folder, names):
                print(index_shards(args.pattern, classes=read_class_list(args.classes) if args.classes else None,
                                   split=args.split, name=args.name, jobs=args.jobs, checksums=args.checksums,
                                   is_stopping=lambda: bool(received)))
            written = write_sidecars(folder, kinds)
        except VirError as error:
            return cli.tell(error, "vir-index")
        except Stopped:
            print(f"vir-index: stopped by {received[0].name}; nothing was written", file=sys.stderr)
            return 128 + received[0]
    if written:
        print(f"for {', '.join(kinds)}: {len(written):,} files written, {written[0].name}, ...")
    return 0


def _elsewhere(args: argparse.Namespace, is_stopping: Callable[[], bool]) -> Sequence[str] | None:
    """The tars whose index does not lie beside them; None where it does."""
    if any(map(is_remote, parts(args.pattern))):
        return find_urls(args.pattern, args.timeout, is_stopping)
    if os.path.isdir(args.pattern):
        folder, names = find_shards(args.pattern)
        return [str(folder / name) for name in names] if args.index_dir else None
    paths = find_paths(args.pattern)
    return paths if args.index_dir or len({os.path.dirname(os.path.abspath(path)) for path in paths}) > 1 else None


def _index_elsewhere(args: argparse.Namespace, urls: Sequence[str], is_stopping: Callable[[], bool]) -> IndexSummary:
    settings = Settings(classes=tuple(read_class_list(args.classes)) if args.classes else None, split=args.split,
                        name=args.name, checksums=args.checksums or None)
    return make_index(urls, args.index_dir or default_index_dir(), args.timeout, settings, args.jobs, is_stopping)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vir-index", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pattern", metavar="PATTERN", help="folder of tars, or a quoted glob or brace pattern of tars; "
        "paths or URLs, several joined by ::")
    add("--classes", type=Path, help="file with the class names, one a line, in label order (default: the sorted names "
                                     "in the txt, or 0, 1, ... up to the highest label)")
    add("--split", help="name of the split (default: the folder's name)")
    add("--name", help="name of the data set (default: what the names of the shards have in common)")
    add("--jobs", type=int, default=8, help="processes (default 8)")
    add("--index-dir", type=Path, help="where the index lies that is not beside the tars (default: "
        "~/.cache/vir-at-scale/indexes for tars on servers or in several folders); --data.index_dir of training")
    add("--timeout", type=float, default=DataConfig.timeout,
        help=f"seconds that a server may take without an answer (default {DataConfig.timeout:g})")
    add("--checksums", action="store_true", help="read every image: keeps the checksums of shards and images, and the "
                                                 "images' sizes; damage is then seen at once (default: headers only)")
    add("--also", default="", help=f"write files for other readers too, separated by commas: {', '.join(KINDS)}; "
                                   "for shards that have an index, nothing else is written, unless "
                                   "--classes, --split, --name or --checksums is given")
    return parser


if __name__ == "__main__":
    sys.exit(main())
