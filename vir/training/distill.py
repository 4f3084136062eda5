"""The model that teaches another one (DeiT, arXiv:2012.12877): which it is, and what it says of the student's pixels.

It is no part of the student, so neither the engine nor a checkpoint has it; a checkpoint has its fingerprint.
"""

# Dimension key: B batch, C channels, H height, W width, K classes of the run.

from __future__ import annotations

import difflib
import hashlib
import json
import os
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vir import distributed
from vir.addresses import shown
from vir.config import DistillConfig
from vir.errors import DataError, SettingsError, VirError
from vir.log import log
from vir.models.build import load
from vir.models.initialize import check_pretrained, classes_of_timm, pretrained_network
from vir.models.network import UNREADABLE
from vir.weights import hub
from vir.weights.fields import some
from vir.weights.portable import is_there, read_metadata
from vir.weights.spec import InputSpec, ModelSpec, input_of

_FLAG = "--distill.teacher"


class Teacher:
    """From the student's pixels to a trained model's logits of the run's classes: in its own precision, with its own
    normalisation, in evaluation mode, without gradients.

    Args:
        network: it is moved to the device and kept from training.
        spec: what it is; its classes are empty where unknown.
        student: of the run.

    Raises:
        SettingsError: it takes other images than the student, or does not know all classes of the run.
    """

    def __init__(self, settings: DistillConfig, network: nn.Module, spec: ModelSpec, student: ModelSpec,
                 device: torch.device) -> None:
        self.settings = settings
        self._title = f"{_FLAG} {shown(settings.teacher)}"
        self._spec = spec
        tensors = network.state_dict()
        self.fingerprint = fingerprint(spec, tensors)
        """Of its tensors, and of what makes logits of them."""
        self.parameters = sum(p.numel() for p in network.parameters())
        self.bytes = sum(x.numel() * x.element_size() for x in (*network.parameters(), *network.buffers()))
        """On each rank."""
        self._network = network.eval().requires_grad_(False).to(device)
        self._dtype = next((x.dtype for x in tensors.values() if x.is_floating_point()), torch.float32)
        self._scale, self._shift = (x.to(device) for x in _affine(student.input, spec.input))
        self._check_size(student.input)
        self._columns = self._columns_of(student.classes, self._count(student.input, device), device)

    def __call__(self, images: Tensor) -> Tensor:
        """Its logits [B, K], float32.

        Args:
            images: [B, C, H, W], normalised for the student; what was erased or mixed in them is so for both.
        """
        logits = self._logits(images)
        return logits if self._columns is None else logits[:, self._columns]

    def describe(self) -> str:
        """A line for people."""
        kind, size = self.settings.kind, "x".join(map(str, self._spec.input.size))
        said = f"soft labels at temperature {self.settings.temperature:g}" if kind == "soft" else "hard labels" + (
            " for the distillation token" if kind == "token" else "")
        return (f"teacher: {self._spec.name}, {self.parameters / 1e6:.2f} M parameters in "
                f"{str(self._dtype).removeprefix('torch.')}, of images of {size}; {said}, alpha "
                f"{self.settings.alpha:g}; fingerprint {self.fingerprint[:12]}")

    @torch.no_grad()  # inference mode gives tensors that no loss can keep for its backward pass
    def _logits(self, images: Tensor) -> Tensor:
        """Of all its own classes."""
        pixels = images.float() * self._scale + self._shift
        return self._network(pixels.to(self._dtype)).float()

    def _check_size(self, student: InputSpec) -> None:
        own, other = self._spec.input.size[1:], student.size[1:]
        cfg = getattr(self._network, "pretrained_cfg", None) or {}
        takes_any = not cfg.get("fixed_input_size", False) or getattr(self._network, "dynamic_img_size", False)
        if own == other or takes_any:
            return
        (height, width), (h, w) = own, other
        raise SettingsError(f"{self._title} takes images of {height}x{width} pixels alone, and those of this run are "
                            f"{h}x{w}; give " + (f"--model.img_size {height}, " if height == width else "") +
                            "a teacher of that size, or one that takes any, such as a resnet50")

    def _count(self, student: InputSpec, device: torch.device) -> int:
        """Of its logits, by computing those of one image."""
        try:
            logits = self._logits(torch.zeros(1, *student.size, device=device))
            if logits.ndim != 2:
                raise ValueError(f"it gives numbers of shape {list(logits.shape)}, not logits")
        except (*UNREADABLE, VirError) as error:
            raise SettingsError(f"{self._title} cannot classify the images of this run, {list(student.size)}: "
                                f"{str(error) or type(error).__name__}; give another teacher") from error
        return logits.shape[1]

    def _columns_of(self, classes: tuple[str, ...], count: int, device: torch.device) -> Tensor | None:
        """Where the run's classes stand among its logits; None where they are all of them, in the same order."""
        known = self._spec.classes
        if not known or len(known) != count:
            if count != len(classes):
                raise SettingsError(f"{self._title} has {count} logits and does not say of which classes; this run has "
                                    f"{len(classes)} classes: give a teacher of these")
            log.warning("%s does not say which classes its %d logits are; they are taken for those of this run, in "
                        "their order", self._title, count)
            return None
        if unknown := sorted(set(classes) - set(known)):
            raise SettingsError(f"{self._title} knows {len(known)} classes, but not {len(unknown)} of the "
                                f"{len(classes)} of this run ({some(unknown)}); give a teacher of all of them")
        if classes == known:
            return None
        return torch.tensor([known.index(name) for name in classes], device=device)


def load_teacher(settings: DistillConfig, student: ModelSpec, device: torch.device) -> Teacher | None:
    """The model that --distill.teacher names; None where it names none. Collective.

    Raises:
        SettingsError: there is no such model, it does not fit the run, or it is not the same on all ranks.
        DataError: its weights cannot be had.
    """
    if not settings.teacher:
        return None
    network, spec = _of_file(settings.teacher) if _is_file(settings.teacher) else _of_timm(settings.teacher, student)
    teacher = Teacher(settings, network, spec, student, device)
    found = distributed.gather(teacher.fingerprint)
    if unlike := [rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]]:
        raise SettingsError(f"{_FLAG} {shown(settings.teacher)} is another model for rank {unlike[0]} than for rank 0; "
                            "see that the file, or timm's cache, is the same on all machines")
    return teacher


def check_teacher(name: str) -> None:
    """Whether there is such a teacher, without loading it.

    Raises:
        SettingsError: neither a file nor a model of timm with pretrained weights has that name.
        DataError: the file does not say which model it holds.
    """
    if _is_file(name):
        if not (os.path.exists(name) or is_there(name)):
            raise SettingsError(f"{_FLAG} {shown(name)}: no such file; give a file of vir-consolidate, or the name of "
                                "a model of timm")
        try:
            read_metadata(_weights(name))
        except DataError as error:
            raise _no_teacher(error) from error
        return
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(pretrained=True), n=3)
        raise SettingsError(f"{_FLAG} {shown(name)}: neither a file nor a model of timm" + (
            f"; did you mean {' or '.join(near)}?" if near else "; timm.list_pretrained() tells those that have weights"
        ))
    try:
        check_pretrained(name, _FLAG, _FLAG)
    except RuntimeError as error:  # of a tag that is none
        raise SettingsError(f"{_FLAG} {name}: {error}; leave the part after the dot out") from error


def make_student(network: nn.Module, name: str, settings: DistillConfig) -> None:
    """Have the heads of a model with a distillation token taught apart, where that is asked for.

    Raises:
        SettingsError: the model has no such token.
    """
    if not settings.teacher or settings.kind != "token":
        return
    if not hasattr(network, "set_distilled_training") or not isinstance(
            getattr(network, "get_classifier")(), (tuple, list)):
        raise SettingsError(f"--distill.kind token: {name} has no distillation token; a ViR has one with --model.args "
                            "'{distilled: true}', of timm's there is deit_small_distilled_patch16_224; or give "
                            "--distill.kind hard")
    getattr(network, "set_distilled_training")(True)


def fingerprint(spec: ModelSpec, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the tensors' names, types, shapes and bytes, of the model that they are in, its normalisation and
    its classes. Where the weights lie, and on which device, is no part of it."""
    said: dict[str, Any] = {"name": spec.name, "args": spec.args, "mean": spec.input.mean, "std": spec.input.std,
                            "classes": spec.classes}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_file(name: str) -> bool:
    """Whether it is the path of something that is there, or can be nothing but a path; a folder may be named as a
    model of timm is."""
    return (is_there(name) or os.path.exists(name) and not timm.is_model(name)
            or name.endswith((".safetensors", ".json", ".pth", ".pt")))


def _weights(path: str) -> str:
    """Of a Hugging Face folder the file in it, where it is one of ours."""
    return str(hub.weights_of(path)) if hub.is_folder(path) else path


def _no_teacher(error: DataError) -> DataError:
    return DataError(f"{_FLAG}: {error}; a teacher is a file of vir-consolidate, or the name of a model of timm")


def _of_file(path: str) -> tuple[nn.Module, ModelSpec]:
    try:
        metadata = read_metadata(_weights(path))
        return load(_weights(path), dtype=metadata.dtype), metadata.model
    except DataError as error:
        raise _no_teacher(error) from error


def _of_timm(name: str, student: ModelSpec) -> tuple[nn.Module, ModelSpec]:
    network, title = pretrained_network(name, _FLAG, f"{_FLAG} FILE")
    classes = classes_of_timm(network, student.classes)
    return network, ModelSpec(name=title, args={}, input=input_of(network), classes=classes)


def _affine(here: InputSpec, there: InputSpec) -> tuple[Tensor, Tensor]:
    """Each [C, 1, 1] float32: x * scale + shift is normalised by `there` where x is by `here`."""
    (mean, std), (their_mean, their_std) = ((torch.tensor(x, dtype=torch.float64) for x in (spec.mean, spec.std))
                                            for spec in (here, there))
    return ((std / their_std).float().view(-1, 1, 1), ((mean - their_mean) / their_std).float().view(-1, 1, 1))
