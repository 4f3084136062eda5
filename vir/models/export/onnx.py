"""Graphs as ONNX files, and how onnxruntime runs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vir.errors import DataError, SettingsError
from vir.models.export.graphs import Graph, Runner
from vir.models.export.program import first_line, quiet
from vir.output_folder import writing


def save_onnx(path: Path, program: ExportedProgram, graph: Graph, metadata: Mapping[str, Any],
              opset: int | None = None) -> int:
    """Write a graph as an ONNX file; beyond 2 GB its weights go into `path`.data.

    Args:
        metadata: For the file's metadata_props, which are texts: what is no text is written as JSON.
        opset: The operator set; None: torch's.

    Returns:
        The operator set.

    Raises:
        SettingsError: torch has no translation of an operator, or none into this set.
        DataError: It cannot be written.
    """
    names = [{graph.batches[name]: "batch", **({tensor.ndim - 2: "height", tensor.ndim - 1: "width"}
                                               if name in graph.sides else {})}
             for name, tensor in graph.inputs.items()]
    try:
        with quiet(), torch.no_grad():
            made = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset, dynamic_shapes=names,
                                     input_names=list(graph.inputs), output_names=list(graph.outputs))
    except torch.onnx.errors.OnnxExporterError as error:
        raise SettingsError(f"torch translates no {graph.name} of this model into ONNX: "
                            f"{first_line(error.__cause__ or error)}; take --to torch_export") from error
    assert made is not None
    found = made.model.opset_imports[""]
    if opset is not None and found != opset:
        raise SettingsError(f"--opset {opset}: torch {torch.__version__} comes no nearer than {found} with this model; "
                            f"give {found}, or leave it out")
    made.model.metadata_props.update({name: value if isinstance(value, str) else json.dumps(value)
                                      for name, value in metadata.items()})
    with writing(path.name):
        made.save(path)
    return found


def load_onnx(path: Path) -> Runner:
    """What an ONNX file computes in onnxruntime, on the CPU.

    Raises:
        DataError: onnxruntime does not take it; so does the runner.
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised; it need not be printed too
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds, one for each code
        raise _refused(path, error) from error

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        names = (given.name for given in session.get_inputs())
        try:
            found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        except Exception as error:
            raise _refused(path, error) from error
        return tuple(map(torch.from_numpy, found))

    return run


def _refused(path: Path, error: Exception) -> DataError:
    return DataError(f"onnxruntime {version('onnxruntime')} does not run {path.name}: {first_line(error)}; give "
                     "another --opset, or update onnxruntime")
