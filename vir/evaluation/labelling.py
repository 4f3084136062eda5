"""What a model says of image files: their classes by probability, and their pooled features.

    from vir import predict_images

    for found in predict_images("vir_small.safetensors", ["photos", "https://example.org/cat.jpg"]):
        print(found.image, found.error or found.guesses[0].name)
"""

# Dimension key: B batch, C channels, H height, W width, K classes, D width of the features.

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vir import launcher
from vir.addresses import shown
from vir.config import DataConfig
from vir.data.decode import FOREIGN, FORMATS, open_image
from vir.data.device import normalize
from vir.data.strip_decoding import LooksDamagedError, open_strips, vips
from vir.data.transforms import EvalTransform
from vir.errors import DataError, SettingsError, VirError
from vir.evaluation.classes import in_words
from vir.evaluation.limits import check_asked
from vir.evaluation.pictures import pictures, read_picture, to_stream
from vir.evaluation.run import check_size
from vir.log import log
from vir.models import VisionRetention, load
from vir.models.kernels import is_out_of_memory
from vir.models.network import described
from vir.weights.hub import class_names_of, refuse_folder
from vir.weights.metadata import DTYPES
from vir.weights.portable import outline
from vir.weights.spec import InputSpec, input_of

T = TypeVar("T")
R = TypeVar("R")

MAX_WORKERS = 16
"""Threads that read and decode, unless another number is asked for: at most so many, and no more than cores."""


@dataclass(frozen=True)
class Guess:
    """One class that an image may be of."""

    logit: int
    """Its number."""
    name: str
    """The class as the weights name it; the number of the logit where they name none."""
    description: str
    """In words, of ImageNet's wnids; else empty."""
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image."""

    image: str
    """Its path or URL, secrets of the URL left out."""
    guesses: tuple[Guess, ...] = ()
    """The most probable classes, the best first; none where there is an error."""
    error: str = ""
    """Why there is no answer, such as a file that does not decode."""
    features: np.ndarray | None = None
    """[D] float32, what the classifier reads; where they were asked for."""


class _Answer(NamedTuple):
    """Of a batch, in float32."""

    logits: Tensor
    """[B, K]"""
    features: Tensor | None
    """[B, D]"""


def predict_images(weights: str | os.PathLike[str] | nn.Module, images: Iterable[str | os.PathLike[str]], *,
                   topk: int = 5, features: bool = False, stream: bool = False, img_size: int | None = None,
                   crop_pct: float | None = None, crop_mode: str | None = None, batch_size: int = 64,
                   workers: int | None = None, device: str | torch.device | None = None,
                   dtype: str | None = None, timeout: float = DataConfig.timeout) -> Iterator[Prediction]:
    """One Prediction for each image, in the order of `images`; one that cannot be read has an error in it.

    Images are prepared as the weights say. Threads read and decode ahead of the model, two batches at most, so memory
    does not grow with the number of images. No image is read before the first answer is asked for.

    Args:
        weights: a weights file, or a timm model in eval mode, whose device, dtype and size are then taken.
        images: paths of files and of folders, all in them included, or URLs; see vir.evaluation.pictures.
        topk: classes to tell of each image, 1 or more; all where there are fewer.
        features: also tell the pooled features.
        stream: compute each image at its own size, neither resized nor cropped, strip by strip, in memory that does not
            grow with its height; of a ViR alone, made with dynamic_img_size and dynamic_img_pad, as those of a weights
            file are made here. See vir.data.strip_decoding for what is decoded so.
        img_size: side of the images in the place of the file's own; so are crop_pct, in (0, 1], and crop_mode.
        batch_size: images of a forward pass.
        workers: threads that read and decode; None for what the cores allow, at most MAX_WORKERS.
        device: for the model of a weights file; the CPU where not given.
        dtype: of that model, fp32, bf16 or fp16; fp32 where not given.
        timeout: of servers without an answer, in seconds.

    Raises:
        DataError: `weights` is no whole weights file; a path is not there.
        SettingsError: an argument is not what it may be; the model is in training mode, does not take these images, has
            no classifier, or needs more memory for a batch than there is; it cannot stream, or pyvips is not installed.
    """
    check_asked(topk=topk, stream=stream, img_size=img_size, crop_pct=crop_pct, crop_mode=crop_mode,
                batch_size=batch_size, workers=workers, dtype=dtype, timeout=timeout)
    if isinstance(weights, nn.Module):
        _check_model(weights, img_size=img_size, device=device, dtype=dtype)
        model = weights
    else:
        model = load_model(weights, device or "cpu", dtype or "fp32", img_size, stream)
    namer = _Namer(model, topk)
    model_input = input_of(model).with_crop(crop_pct, crop_mode)
    if stream:
        return _streamed(_check_stream(model), namer, model_input, pictures(images), features, timeout)
    return _predictions(model, namer, model_input, pictures(images), features=features, batch_size=batch_size,
                        workers=workers or default_workers(), timeout=timeout)


def _check_model(model: nn.Module, **of_a_file: Any) -> None:
    """Raises SettingsError where it would answer at random, or is given what a weights file alone can be made for."""
    if model.training:
        raise SettingsError("the model is in training mode, where dropout draws and batch norm moves; call "
                            "model.eval() first")
    if given := [name for name, value in of_a_file.items() if value is not None]:
        raise SettingsError(f"{given[0]} is for the model of a weights file, and a model is given; leave it out, and "
                            "make the model so")


def _predictions(model: nn.Module, namer: _Namer, model_input: InputSpec, names: Iterator[str], *, features: bool,
                 batch_size: int, workers: int, timeout: float) -> Iterator[Prediction]:
    parameter = next(model.parameters())
    tasks = ahead(partial(_prepared, transform=EvalTransform(model_input), timeout=timeout), names, workers,
                  2 * batch_size)
    for batch in _batches(tasks, batch_size):
        sound = [sample for _, sample in batch if isinstance(sample, Tensor)]
        answers: Iterator[tuple[Tensor, Tensor | None]] = iter(())
        if sound:
            pixels = normalize(torch.stack(sound).to(parameter.device), model_input).to(parameter.dtype)
            answer = _in_memory(partial(_answer, model, pixels, features), SettingsError, f"--batch-size {batch_size}",
                                "give a smaller one, or try --dtype bf16")
            answers = zip(answer.logits.cpu(), [None] * len(sound) if answer.features is None else
                          answer.features.cpu())
        for name, sample in batch:
            yield namer.prediction(name, *next(answers)) if isinstance(sample, Tensor) else Prediction(
                shown(name), error=sample)


@torch.no_grad()
def _streamed(model: VisionRetention, namer: _Namer, model_input: InputSpec, names: Iterator[str], features: bool,
              timeout: float) -> Iterator[Prediction]:
    parameter = next(model.parameters())

    def prepared(strip: np.ndarray) -> Tensor:
        """[h, w, 3] uint8 -> [1, 3, h, w], normalised."""
        pixels = torch.from_numpy(np.array(strip)).permute(2, 0, 1).unsqueeze(0).to(parameter.device)
        return normalize(pixels, model_input).to(parameter.dtype)

    def tokens_of(file: bytes | Path, whole: bool) -> Tensor:
        """Those that the head reads."""
        with open_strips(file, whole) as strips:
            return model.forward_stream_features(map(prepared, strips.pixels), (strips.height, strips.width))

    def answer_of(name: str) -> _Answer:
        file = to_stream(name, timeout)
        try:
            tokens = tokens_of(file, False)
        except LooksDamagedError:
            tokens = tokens_of(file, True)
        return _of_tokens(model, tokens, features)

    for name in names:
        try:
            answer = _in_memory(partial(answer_of, name), DataError, "it", "try --dtype bf16, or leave out --stream")
        except DataError as error:
            said = str(error)  # the error itself holds what memory it was in the middle of
        else:
            said = ""
        yield Prediction(shown(name), error=said) if said else namer.prediction(
            name, answer.logits[0].cpu(), None if answer.features is None else answer.features[0].cpu())


def _check_stream(model: nn.Module) -> VisionRetention:
    """Raises SettingsError where it cannot stream images of any size, or no image can be streamed here."""
    if not isinstance(model, VisionRetention):
        raise SettingsError(f"--stream is for ViR, whose retention is causal, not for {type(model).__name__}; leave it "
                            "out")
    if not (model.dynamic_img_size and model.patch_embed.dynamic_img_pad):
        raise SettingsError("to stream, make the model with dynamic_img_size=True and dynamic_img_pad=True")
    if not model.global_pool:
        raise SettingsError("--stream keeps no patches, and this model has global_pool=''; leave --stream out")
    vips()
    return model


def load_model(weights: str | os.PathLike[str], device: str | torch.device, dtype: str, img_size: int | None,
               stream: bool) -> nn.Module:
    """The model of a weights file, for images of this size; see `predict_images`."""
    path = Path(weights)
    refuse_folder("WEIGHTS", path)
    args: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if stream:
        metadata, outlines = outline(path)
        if isinstance(described(path, metadata.model, outlines), VisionRetention):  # else _check_stream says what it is
            args |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    model = load(path, device, DTYPES[dtype], **args)
    if img_size is not None:
        check_size(path, model, input_of(model), img_size, DTYPES[dtype], torch.device(device))
    return model


def default_workers() -> int:
    return min(launcher.cores(), MAX_WORKERS)


def ahead(function: Callable[[T], R], tasks: Iterable[T], workers: int, most: int) -> Iterator[R]:
    """function of each task, in the order of the tasks, by threads that are at most `most` tasks ahead of the reader.
    """
    pool, running = ThreadPoolExecutor(workers, "vir-picture"), deque[Future[R]]()
    try:
        for task in tasks:
            running.append(pool.submit(function, task))
            if len(running) >= most:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepared(name: str, transform: EvalTransform, timeout: float) -> tuple[str, Tensor | str]:
    """The name, and the sample [C, H, W] uint8 or what is wrong with the file."""
    def prepared() -> Tensor:
        image = open_image(read_picture(name, timeout), FORMATS + FOREIGN)
        crop = transform.crop(image.width, image.height)
        return transform.apply(image.pixels(crop.box), crop)

    try:
        return name, _in_memory(prepared, DataError, "it", "give fewer --workers, or scale it down")
    except DataError as error:
        return name, str(error)


def _batches(samples: Iterable[tuple[str, Tensor | str]], size: int) -> Iterator[list[tuple[str, Tensor | str]]]:
    """In their order, with at most `size` in each that can be computed."""
    batch: list[tuple[str, Tensor | str]] = []
    count = 0
    for sample in samples:
        batch.append(sample)
        count += isinstance(sample[1], Tensor)
        if count == size or len(batch) == 2 * size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


@torch.inference_mode()
def _answer(model: Any, images: Tensor, features: bool) -> _Answer:
    """Args: images: [B, C, H, W], normalised."""
    if not features:
        return _Answer(model(images).float(), None)
    return _of_tokens(model, model.forward_features(images), features)


def _of_tokens(model: Any, tokens: Tensor, features: bool) -> _Answer:
    return _Answer(model.forward_head(tokens).float(),
                   model.forward_head(tokens, pre_logits=True).float().flatten(1) if features else None)


def _in_memory(act: Callable[[], R], kind: type[VirError], asked: str, way_out: str) -> R:
    """Raises an error of this kind where it needs more memory than there is."""
    try:
        return act()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = "".join(f" ({line})" for line in str(error).splitlines()[:1])
        raise kind(f"{asked} needs more memory than there is{told}; {way_out}") from error


class _Namer:
    """From logits to classes.

    Raises:
        SettingsError: the model has no logits.
    """

    def __init__(self, model: nn.Module, topk: int) -> None:
        count = int(getattr(model, "num_classes", 0))
        if not count:
            raise SettingsError(f"this {type(model).__name__} has no classifier; give weights that have one, as of a "
                                "run with --model.init_from")
        metadata = getattr(model, "weights_metadata", None)
        names: Sequence[str] = class_names_of(model) if metadata is None else metadata.model.classes
        if not names:
            log.warning("the weights name no classes: the numbers of the %d logits, from 0 on, stand in their place",
                        count)
        self._names = names or [str(logit) for logit in range(count)]
        self._words = in_words(self._names) or [""] * count
        self._topk = min(topk, count)

    def prediction(self, name: str, logits: Tensor, features: Tensor | None) -> Prediction:
        """Args: logits: [K]; features: [D]."""
        if not logits.isfinite().all():
            return Prediction(shown(name), error="its logits are not finite; fp16 holds no more than 65504: try "
                                                 "--dtype bf16")
        values, found = logits.softmax(dim=0).topk(self._topk)
        guesses = tuple(Guess(logit, self._names[logit], self._words[logit], value)
                        for logit, value in zip(found.tolist(), values.tolist()))
        return Prediction(shown(name), guesses, features=None if features is None else features.numpy())


if __name__ == "__main__":
    raise SystemExit("vir.evaluation.labelling is a part of the library; the program is vir-predict")
