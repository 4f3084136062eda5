"""Programs of torch.export, and the packages that AOTInductor compiles of them."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vir.errors import SettingsError
from vir.models.export.graphs import Graph, Runner
from vir.output_folder import writing

METADATA_FILE = "vir.json"
"""In a program's file: what torch.export.load returns in extra_files."""


def exported(graph: Graph) -> ExportedProgram:
    """The graph with symbols for the batch, and for height and width where they may change.

    Raises:
        SettingsError: torch.export cannot express it.
    """
    shapes: list[dict[int, Any]] = []
    batch = Dim("batch", min=1)
    for name, tensor in graph.inputs.items():
        sides = {graph.batches[name]: batch}
        for axis, (title, patch) in enumerate(zip(("rows", "columns"), graph.sides.get(name, ()))):
            sides[tensor.ndim - 2 + axis] = patch * Dim(title, min=2)  # 1 would be another graph
        shapes.append(sides)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(graph.module, tuple(graph.inputs.values()), dynamic_shapes=tuple(shapes))
    except Exception as error:  # of Dynamo, of the shapes' solver, of the model
        raise SettingsError(f"torch.export cannot express {graph.name} of this {type(graph.module).__name__} with a "
                            f"batch of any size: {first_line(error)}; export another model, or update torch"
                            ) from error


def save_program(path: Path, program: ExportedProgram, metadata: Mapping[str, Any]) -> None:
    """Write the `.pt2` file. DataError where it cannot be written."""
    made = io.BytesIO()  # torch's own writer kills the process where the disk is full
    torch.export.save(program, made, extra_files={METADATA_FILE: json.dumps(metadata)})
    with writing(path.name):
        path.write_bytes(made.getbuffer())


def load_program(path: Path) -> Runner:
    """What a `.pt2` file computes."""
    with path.open("rb") as file, quiet():
        module = torch.export.load(file).module()
    return lambda *inputs: _as_tuple(module(*inputs))


def compile_package(path: Path, program: ExportedProgram) -> Runner:
    """Compile the program for this machine's CPU into a package at `path`, and load it.

    Raises:
        Exception: Whatever torch's compiler, or that of C++, ends with.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    made = io.BytesIO()  # as in save_program
    with quiet(), torch.no_grad():
        aoti_compile_and_package(program, package_path=made)
        path.write_bytes(made.getbuffer())
        package = aoti_load_package(str(path))
    return lambda *inputs: _as_tuple(package(*inputs))


def compiler() -> str | None:
    """The C++ compiler that torch would call; None where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def first_line(error: BaseException) -> str:
    """Of an error's text, or of its kind where it has none."""
    return next(filter(None, str(error).splitlines()), type(error).__name__)


def _as_tuple(found: Tensor | tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporters and compilers log and warn of their own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
