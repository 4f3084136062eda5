"""Export a weights file for other runtimes: ONNX, torch.export with a compiled package, a Hugging Face folder.

    vir-export vir_small.safetensors --to onnx exported/
    vir-export vir_small.safetensors --to onnx exported/ --dynamic-size --images photos/
    vir-export vir_small.safetensors --to torch_export exported/ --form recurrent

Batches may have any size. What was written is loaded again and compared with the model on real images, in batches of
one and three: where a logit differs by more than 1e-4, nothing is left. Class names and preprocessing are in the files'
metadata. The recurrent form is two graphs for devices that stream: `step` takes a patch (with 2-D decay a row of
patches), its number and the state, and gives the next state; `read` gives the logits of a state. All is made and
compared on the CPU, in float32. Exit codes: 0 done, 2 settings, 3 data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vir import __version__, cli, launcher
from vir.addresses import shown
from vir.config import DataConfig
from vir.errors import DataError, SettingsError, VirError
from vir.files import sha256
from vir.log import log
from vir.output_folder import check_folder, filling

if TYPE_CHECKING:  # --help and a wrong flag are answered before torch is imported
    from torch import Tensor, nn

    from vir.models.export.graphs import Graph, Runner
    from vir.weights.spec import InputSpec

FORMATS = ("onnx", "torch_export", "hub")
FORMS = ("parallel", "recurrent")
TOLERANCE = 1e-4
"""The largest difference of a logit, as a share of the largest logit where that is above 1."""

BATCH = 3
"""Images that are compared at once; the first one alone too."""

MOST_IMAGES = 8
"""Of a folder, for the comparison."""

_PHOTOGRAPHS = ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png", "logo2.png")
"""Images that come with matplotlib."""


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path
    about: str
    """The operator set, or the kind of program."""
    difference: float
    """The largest of a logit from the model's."""
    images: int
    """On which that was found."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vir-export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, metavar="FILE.safetensors",
                        help="made by vir-consolidate; it names its model itself")
    parser.add_argument("--to", choices=FORMATS, required=True,
                        help="onnx: FOLDER/model.onnx; torch_export: FOLDER/model.pt2, and with a C++ compiler "
                             "FOLDER/model.aoti.pt2 for this kind of CPU; hub: a folder in timm's layout")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write; other files in it stay")
    graph = parser.add_argument_group("graphs", "of onnx and torch_export")
    graph.add_argument("--form", choices=FORMS, default="parallel",
                       help="recurrent: step and read in the place of model, of a ViR (default: parallel)")
    graph.add_argument("--dynamic-size", action="store_true", help="take images of all sizes that are two or more "
                       "whole patches high and wide, of a ViR in the parallel form; positions are resampled")
    graph.add_argument("--opset", type=int, metavar="N", help="operator set of ONNX (default: the one that torch "
                       "recommends, which is told)")
    graph.add_argument("--images", metavar="IMAGE|FOLDER|URL", help="to compare on; of a folder the first "
                       f"{MOST_IMAGES} (default: pictures that come with matplotlib)")
    parser.add_argument("--evaluation", type=Path, metavar="results.json",
                        help="what vir-evaluate --json wrote of the weights, for the model card of --to hub")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    graphs_only = {"--form": args.form != "parallel", "--dynamic-size": args.dynamic_size,
                   "--opset": args.opset is not None, "--images": args.images is not None}
    for flag, is_given in graphs_only.items():
        if is_given and args.to == "hub":
            parser.error(f"{flag} is not for --to hub; leave it out")
    if args.evaluation is not None and args.to != "hub":
        parser.error(f"--evaluation is for the model card of --to hub, not for --to {args.to}; leave it out")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    launcher.hide_gpus()
    try:
        with cli.interruptible():
            if args.to == "hub":
                export_hub(args.weights, args.folder, evaluation=args.evaluation, force=args.force)
                print(f"{args.folder}: timm.create_model('local-dir:{args.folder}', pretrained=True)")
                return 0
            written = export_model(args.weights, args.folder, to=args.to, form=args.form, opset=args.opset,
                                   dynamic_size=args.dynamic_size, images=args.images, force=args.force)
    except VirError as error:
        return cli.tell(error, "vir-export")
    except cli.Interrupted as end:
        print("vir-export: interrupted, nothing was written", file=sys.stderr)
        return end.exit_code
    for one in written:
        print(f"{one.path}: {one.about}, {one.path.stat().st_size / 1e6:.1f} MB; largest logit difference "
              f"{one.difference:.1e} on {one.images} image{'' if one.images == 1 else 's'}")
    return 0


def export_model(weights: str | os.PathLike[str], folder: str | os.PathLike[str], *, to: str = "onnx",
                 form: str = "parallel", dynamic_size: bool = False, opset: int | None = None,
                 images: str | os.PathLike[str] | None = None, force: bool = False) -> list[Exported]:
    """Write the graphs of a weights file's model into a folder, after they were compared with it.

    Args:
        to: `onnx`, or `torch_export`: programs, and packages of AOTInductor where there is a C++ compiler. A package
            that is not made leaves a warning.
        form: `parallel` (one graph, model) or `recurrent` (two, step and read).
        dynamic_size: Take images of all sizes of whole patches, two or more.
        opset: Of ONNX; None: torch's.
        images: A file or a folder to compare on; None: pictures that come with matplotlib.
        force: Replace files of these names.

    Raises:
        SettingsError: an argument is none of these, or not for the others; the model has no such form or graph; a file
            exists; a library is missing.
        DataError: the weights or images cannot be read, nothing can be written, or a graph gives other logits.
    """
    _check_how(to, form, dynamic_size, opset)
    _check_libraries(to)
    from vir.models import load
    from vir.models.export.graphs import GRAPHS, graphs
    from vir.weights.hub import refuse_folder
    from vir.weights.portable import files_of, read_metadata

    weights, folder = Path(weights), Path(folder)
    refuse_folder("FILE.safetensors", weights)
    names = [f"{graph}{ending}" for graph in GRAPHS[form] for ending in _ENDINGS[to]]
    check_folder(folder, names, force)
    metadata = read_metadata(weights)
    pictures = _pictures(images)
    model = load(weights)
    parts = graphs(model, metadata.model.input.size, form, dynamic_size)
    if dynamic_size:
        model = load(weights, dynamic_img_size=True)
    inputs = _inputs(pictures, metadata.model.input, parts[0])
    described = json.loads(metadata.to_json())
    del described["format_version"]  # of the weights file
    try:
        described["weights_sha256"] = {path.name: sha256(path) for path in files_of(weights)}
    except OSError as error:
        raise DataError(f"{weights} cannot be read: {error}; copy it again") from error
    described |= {"form": form, "exported_by": f"vir {__version__}"}
    compare = Comparison(model, form, inputs, len(pictures))
    with filling(folder, names) as temporary:
        written = _WRITERS[to](temporary, parts, described, compare, opset)
    return [replace(one, path=folder / one.path.name) for one in written]


def export_hub(weights: str | os.PathLike[str], folder: str | os.PathLike[str], *,
               evaluation: str | os.PathLike[str] | None = None, force: bool = False) -> None:
    """Write a folder as timm has them on Hugging Face: config.json, model.safetensors and a model card.

    Args:
        evaluation: what `vir-evaluate --json` wrote of these weights, for the card.
        force: Replace these files where they exist.

    Raises:
        SettingsError: the folder has such files; the evaluation is of other weights.
        DataError: something cannot be read or written.
    """
    from vir.models.network import described
    from vir.weights import hub
    from vir.weights.portable import outline

    hub.refuse_folder("FILE.safetensors", Path(weights))
    metadata, outlines = outline(weights)
    hub.write_folder(Path(folder), Path(weights), described(weights, metadata.model, outlines), force=force,
                     evaluation=None if evaluation is None else Path(evaluation))


class Comparison:
    """What a model says of images, to be compared with what its graphs say."""

    def __init__(self, model: nn.Module, form: str, inputs: Sequence[Tensor], images: int) -> None:
        """Args:
            inputs: Images [N, C, height, width] of each size, normalised.
            images: The number of those that differ.
        """
        import torch

        self._model, self._form = model, form
        self._batches = [batch for of_size in inputs for batch in (of_size[:1], *of_size.split(BATCH))]
        self.images = images
        with torch.inference_mode():
            self._logits = [model(batch) for batch in self._batches]
        self._allowed = TOLERANCE * max(1.0, *(logits.abs().max().item() for logits in self._logits))

    def checked(self, runners: dict[str, Runner], what: str) -> float:
        """The largest difference of a logit.

        Raises:
            DataError: it is more than TOLERANCE allows; `what` differs.
        """
        difference = self._difference(runners)
        if not difference <= self._allowed:
            raise DataError(f"{what} differ from the model's by {difference:.2g}, more than {self._allowed:.1g}; "
                            "nothing is written: try another --to, --opset or --images")
        return difference

    def _difference(self, runners: dict[str, Runner]) -> float:
        """NaN where one is not finite."""
        import torch

        from vir.models.export.graphs import logits_of

        with torch.no_grad():
            found = [logits_of(self._model, self._form, runners, batch) for batch in self._batches]
        return torch.stack([(one - own).abs().max() for one, own in zip(found, self._logits)]).max().item()


def _write_onnx(folder: Path, parts: list[Graph], described: dict[str, Any], compare: Comparison,
                opset: int | None) -> list[Exported]:
    from vir.models.export.onnx import load_onnx, save_onnx
    from vir.models.export.program import exported

    paths = {graph.name: folder / f"{graph.name}.onnx" for graph in parts}
    found = {graph.name: save_onnx(paths[graph.name], exported(graph), graph, described, opset) for graph in parts}
    difference = compare.checked({name: load_onnx(path) for name, path in paths.items()}, "onnxruntime's logits")
    return [Exported(path, f"opset {found[name]}", difference, compare.images) for name, path in paths.items()]


def _write_programs(folder: Path, parts: list[Graph], described: dict[str, Any], compare: Comparison,
                    opset: int | None) -> list[Exported]:
    from vir.models.export.program import exported, load_program, save_program

    paths = {graph.name: folder / f"{graph.name}.pt2" for graph in parts}
    programs = {graph.name: exported(graph) for graph in parts}
    for name, program in programs.items():
        save_program(paths[name], program, described)
    difference = compare.checked({name: load_program(path) for name, path in paths.items()}, "the program's logits")
    written = [Exported(path, "torch.export program", difference, compare.images) for path in paths.values()]
    return written + _write_packages(folder, programs, compare)


def _write_packages(folder: Path, programs: dict[str, Any], compare: Comparison) -> list[Exported]:
    """None, after a warning, where they cannot be compiled or are not the model's."""
    from vir.models.export.program import compile_package, compiler, first_line

    paths = {name: folder / f"{name}.aoti.pt2" for name in programs}
    if compiler() is None:
        log.warning("no C++ compiler here: the programs are written, and no packages of AOTInductor")
        return []
    try:
        difference = compare.checked({name: compile_package(path, programs[name]) for name, path in paths.items()},
                                     "its logits")
    except Exception as error:  # of torch's compiler, of the C++ one, of the loader
        for path in paths.values():
            path.unlink(missing_ok=True)
        log.warning("AOTInductor makes no package of this model here (%s); the programs are written", first_line(error))
        return []
    return [Exported(path, "AOTInductor package", difference, compare.images) for path in paths.values()]


_WRITERS: dict[str, Callable[[Path, list[Graph], dict[str, Any], Comparison, int | None], list[Exported]]] = {
    "onnx": _write_onnx, "torch_export": _write_programs}

_ENDINGS = {"onnx": (".onnx.data", ".onnx"), "torch_export": (".pt2", ".aoti.pt2")}
"""Of a graph's files, in the order in which they take their places."""


def _check_how(to: str, form: str, dynamic_size: bool, opset: int | None) -> None:
    """Raises SettingsError, before torch is imported."""
    if to not in _WRITERS:
        raise SettingsError(f"--to is {to!r}; choose onnx or torch_export, or call export_hub for a folder of Hugging "
                            "Face")
    if form not in FORMS:
        raise SettingsError(f"--form is {form!r}; choose parallel or recurrent")
    if dynamic_size and form == "recurrent":
        raise SettingsError("--dynamic-size is of the parallel form; leave out --form recurrent")
    if opset is not None and to != "onnx":
        raise SettingsError(f"--opset is of ONNX, not for --to {to}; leave it out")
    if opset is not None and opset < 1:
        raise SettingsError(f"--opset is {opset}; it must be at least 1")


def _check_libraries(to: str) -> None:
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
    if missing := [name for name in needed.get(to, ()) if find_spec(name) is None]:
        raise SettingsError(f"--to {to} needs {' and '.join(missing)}; install it: pip install 'vir-at-scale[export]'")


def _pictures(given: str | os.PathLike[str] | None) -> dict[str, bytes]:
    """Files of images by their names."""
    if given is None:
        from matplotlib.cbook import get_sample_data

        try:
            return {name: Path(get_sample_data(name, asfileobj=False)).read_bytes() for name in _PHOTOGRAPHS}
        except OSError as error:
            raise SettingsError(f"matplotlib has come without its pictures ({error}); give --images") from error
    from vir.data.decode import BadSampleError
    from vir.evaluation.pictures import count_pictures, pictures, read_picture

    found = {}
    count_pictures([given], DataConfig.timeout)
    for name in islice(pictures([given]), MOST_IMAGES):
        try:
            found[name] = read_picture(name, DataConfig.timeout)
        except BadSampleError as error:
            raise DataError(f"--images {shown(name)}: {error}; give another image") from error
    return found


def _inputs(pictures: dict[str, bytes], model_input: InputSpec, graph: Graph) -> list[Tensor]:
    """The images [N, C, height, width], normalised, at the model's size, and at another one where any may come."""
    import numpy as np
    import torch

    from vir.data.decode import FOREIGN, FORMATS, BadSampleError, decode_image
    from vir.data.device import normalize
    from vir.data.transforms import EvalTransform

    channels, height, width = model_input.size
    sizes = [(height, width)] + [(height + down, width + 2 * right) for down, right in graph.sides.values()]
    decoded = []
    for name, data in pictures.items():
        try:
            decoded.append(decode_image(data, (*FORMATS, *FOREIGN)))
        except BadSampleError as error:
            raise DataError(f"--images {shown(name)}: {error}; give another image") from error
    found = []
    for size in sizes:
        transform = EvalTransform(replace(model_input, size=(channels, *size)))
        samples = [transform.apply(np.array(image), transform.crop(*image.size)) for image in decoded]
        samples += [samples[0]] * (BATCH - len(samples))
        found.append(normalize(torch.stack(samples), model_input))
    return found


if __name__ == "__main__":
    sys.exit(main())
