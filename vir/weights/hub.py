"""Folders as timm has them on Hugging Face: config.json, the weights, and a model card."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vir.errors import DataError, SettingsError
from vir.files import read_regular, sha256
from vir.output_folder import check_folder, filling, writing
from vir.weights.fields import is_count, is_list_of_texts, is_text, is_text_map, some, strict_json
from vir.weights.metadata import MODEL_RULES, WeightsMetadata
from vir.weights.portable import files_of, is_there, read, read_metadata, save_weights
from vir.weights.spec import InputSpec, ModelSpec

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FILES = (WEIGHTS, CARD, CONFIG)
"""In the order in which they are written: timm takes no folder without its config.json."""

_READ = (WEIGHTS, "pytorch_model.bin")
"""Names of the weights, the first that is there; timm takes them in this order."""

_MOST_JSON = 1 << 26
"""Bytes of a config.json, and of results; one with the names of 21,000 classes has less than 2 MB."""

_DEFAULTS: dict[str, Any] = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
                             "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}
"""timm's, of what a config.json does not say."""


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder with a config.json."""
    return os.path.isfile(os.path.join(path, CONFIG))


def refuse_folder(flag: str, path: Path) -> None:
    """Raises SettingsError where a run folder, one of Hugging Face, or another is given for a weights file."""
    if is_folder(path):
        raise SettingsError(f"{flag} {path} is a folder; give the weights file in it: {path / WEIGHTS}")
    if path.is_dir():
        raise SettingsError(f"{flag} {path} is a folder; make a weights file of a run first: vir-consolidate "
                            f"{path} --output {path.name or 'vir'}.safetensors")


def read_config(folder: str | os.PathLike[str]) -> ModelSpec:
    """The model that the config.json of a folder describes, in timm's layout, also the older one of one level.

    Returns:
        The classes are those of `label_names`; none where there are no names, or none for some of the logits.

    Raises:
        DataError: it cannot be read, describes no model of timm, or contradicts itself.
    """
    file = Path(folder) / CONFIG
    fields = _read_json(file, "a config.json of timm")
    try:
        return _spec(fields)
    except ValueError as error:
        raise DataError(f"{file} is not one that timm writes: {error}; take the folder of a model of timm, or give the "
                        "weights file in it") from error


def weights_of(folder: str | os.PathLike[str]) -> Path:
    """The weights beside a config.json. DataError where there are none of a name that is read here."""
    found = [Path(folder) / name for name in _READ if is_there(Path(folder) / name)]
    if not found:
        raise DataError(f"{folder} has a {CONFIG} and neither {' nor '.join(_READ)}; copy the weights too")
    return found[0]


def _spec(fields: dict[str, Any]) -> ModelSpec:
    """Raises ValueError, a sentence."""
    name, described = fields.get("architecture"), fields.get("pretrained_cfg", fields)
    if not is_text(name) or not name:
        raise ValueError("it names no architecture of timm")
    args = fields.get("model_args", {})
    takes, what = MODEL_RULES["model_args"]
    if not takes(args):
        raise ValueError(f"model_args is not {what}")
    if not isinstance(described, dict):
        raise ValueError("pretrained_cfg is not an object")
    image = {key: described.get(key) or default for key, default in _DEFAULTS.items()}
    if size := args.get("img_size"):  # which timm does not always repeat below
        image["input_size"] = [3, *(size if isinstance(size, list) else (size, size))]
    classes = _class_names(_either(fields, described, "label_names", "labels"))
    count = args.get("num_classes", _either(fields, described, "num_classes"))
    if count is not None and not is_count(count):
        raise ValueError(f"num_classes is {str(count)[:100]}, not a whole number")
    if classes and count is not None and len(classes) != count:
        raise ValueError(f"it has {len(classes)} label_names and {count} classes")
    return ModelSpec(name=name, args={**args, **({} if count is None else {"num_classes": count})}, classes=classes,
                     input=InputSpec.from_json(size=image.pop("input_size"), **image))


def _either(fields: Mapping[str, Any], described: Mapping[str, Any], *names: str) -> Any:
    """The first that is given, the upper level before the lower one."""
    return next((level[name] for level in (fields, described) for name in names if level.get(name) is not None), None)


def class_names_of(model: nn.Module) -> tuple[str, ...]:
    """The names of classes that a model's pretrained_cfg has, as that of a Hugging Face folder does; none where they
    are not of all its logits."""
    try:
        names = _class_names((getattr(model, "pretrained_cfg", None) or {}).get("label_names"))
    except ValueError:
        return ()
    return names if len(names) == getattr(model, "num_classes", None) else ()


def _class_names(label_names: Any) -> tuple[str, ...]:
    """What timm has for names of classes: a list in the order of the logits, or an object of their numbers.

    Returns:
        None of them where there are none, or none for some of the logits.

    Raises:
        ValueError: a sentence, where it is neither.
    """
    if isinstance(label_names, dict):
        label_names = [label_names.get(str(number)) for number in range(len(label_names))]
        label_names = [] if None in label_names else label_names
    if label_names is not None and not is_list_of_texts(label_names):
        raise ValueError("label_names is neither a list of names nor an object of names by number")
    return tuple(label_names or ())


def write_folder(folder: Path, path: Path, network: nn.Module, *, evaluation: Path | None = None,
                 force: bool = False) -> None:
    """Write a weights file of ours as a folder of Hugging Face in timm's layout.

    timm.create_model("local-dir:FOLDER", pretrained=True) gives its model, after `import vir.models` where it is one
    of ours. The weights keep their header, so that vir takes the file in the folder as it takes `path`. Other files in
    a folder that exists stay.

    Args:
        path: also of weights in several files, which become one.
        network: that of the file, as vir.models.load gives it; it may be on the meta device.
        evaluation: what `vir-evaluate --json` wrote of these weights, for the model card.
        force: replace the files that are there.

    Raises:
        SettingsError: the folder has such files; the evaluation is of other weights.
        DataError: something cannot be read or written.
    """
    check_folder(folder, FILES, force)
    metadata = read_metadata(path)
    results = None if evaluation is None else read_evaluation(evaluation, path)
    with filling(folder, FILES) as temporary, writing(folder):
        if (files := files_of(path)) == [path]:
            shutil.copyfile(path, temporary / WEIGHTS)  # to the last bit, so that its SHA-256 is the same
        else:
            save_weights(temporary / WEIGHTS, read(path)[1], metadata)
        config = json.dumps(_config(metadata.model, network), indent=2, ensure_ascii=False)
        (temporary / CONFIG).write_text(config + "\n", encoding="utf-8")
        (temporary / CARD).write_text(_card(metadata, network, files, results), encoding="utf-8")


def _config(spec: ModelSpec, network: nn.Module) -> dict[str, Any]:
    """As timm's save_config_for_hf has it, without where timm's own weights of that name come from."""
    own: Mapping[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    count, pool = getattr(network, "num_classes"), getattr(network, "global_pool", None)
    described = {key: own.get(key) for key in ("first_conv", "classifier")}
    described |= {"fixed_input_size": own.get("fixed_input_size", False), "custom_load": False, "num_classes": count}
    return {
        "architecture": spec.name.partition(".")[0], "num_classes": count,
        "num_features": getattr(network, "num_features"),
        **({"global_pool": pool} if isinstance(pool, str) and pool else {}),
        **({"label_names": spec.classes} if spec.classes else {}),
        "model_args": spec.args, "pretrained_cfg": {**described, **spec.input.timm_cfg()}}


# ---- The model card


_RESULT: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: (is_count, "a whole number") for name in ("images", "images_left_out", "classes")},
    **{name: (lambda value: type(value) in (int, float), "a number") for name in ("top1", "top5")},
    **{name: (lambda value: value is None or type(value) in (int, float), "a number or null")
       for name in ("loss", "ece")},
    **{name: (is_text, "a text") for name in ("data", "data_fingerprint", "command")},
    "versions": (lambda value: is_text_map(value) and is_list_of_texts(list(value.values())), "an object of texts")}
"""What a card says of an evaluation."""


def read_evaluation(file: Path, path: Path) -> dict[str, Any]:
    """What `vir-evaluate --json FILE` wrote of the weights at `path`, among others or alone.

    Raises:
        DataError: it is no such file.
        SettingsError: it is of other weights.
    """
    what = "what vir-evaluate --json writes"
    results = _read_json(file, what, (dict, list))
    try:
        checksums = sorted(sha256(one) for one in files_of(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; copy it again") from error
    for result in results if isinstance(results, list) else [results]:
        of_files = result.get("weights_sha256") if isinstance(result, dict) else None
        if not isinstance(of_files, dict) or not is_list_of_texts(list(of_files.values())):
            raise DataError(f"{file} is not {what}: it does not say of which weights it is; evaluate again")
        if sorted(of_files.values()) != checksums:
            continue
        for name, (holds, kind) in _RESULT.items():
            if not holds(result.get(name)):
                raise DataError(f"{file} is not {what}: {name} is not {kind}; evaluate again")
        return dict(result)
    raise SettingsError(f"--evaluation {file} is not of {path}, whose SHA-256 is {some(checksums)}; make one by "
                        f"vir-evaluate --weights {path} --data SHARDS/val --json FILE")


def _card(metadata: WeightsMetadata, network: nn.Module, files: list[Path], results: Mapping[str, Any] | None) -> str:
    """README.md as Hugging Face shows it: front matter, then Markdown."""
    spec = metadata.model
    image, count = spec.input, sum(parameter.numel() for parameter in network.parameters())
    logits = getattr(network, "num_classes")
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
# The licence is yours to choose. Name it here before you publish this folder, as in
# license: apache-2.0
---
# {spec.name}

An image classifier of {logits} classes, trained with vir-at-scale.

## Model

- **Architecture:** {_code(spec.name)} of timm with {_code(json.dumps(spec.args, ensure_ascii=False))}
- **Parameters:** {count:,}
- **Images:** {' x '.join(map(str, image.size))} (channels, height, width), resized by {_code(image.interpolation)},
  crop {image.crop_pct:g} ({_code(image.crop_mode)}), mean {list(image.mean)}, standard deviation {list(image.std)}
- **Weights:** {'averaged (EMA)' if metadata.ema else 'raw'}, {metadata.dtype}, of step {metadata.step:,} after \
{metadata.samples_seen:,} images

## Data

{_data(metadata, logits)}

## Accuracy

{_accuracy(results, files)}

## Use

{_use(network, bool(spec.classes))}

## Repeat

{_repeat(metadata, results)}
"""


def _data(metadata: WeightsMetadata, logits: int) -> str:
    names = "their names are `label_names` in config.json" if metadata.model.classes else "their names are not known"
    fingerprint = ("SHA-256 of the training images and classes, as vir-at-scale takes it: "
                   f"{_code(metadata.data_fingerprint)}." if metadata.data_fingerprint else
                   "The weights file does not say on which images it was trained.")
    return f"{logits} classes; {names}. {fingerprint}"


def _accuracy(results: Mapping[str, Any] | None, files: list[Path]) -> str:
    if results is None:
        return ("Not evaluated. `vir-evaluate --weights model.safetensors --data SHARDS/val --json results.json` does "
                "it, and the card\nsays so where the folder is exported with `--evaluation results.json`.")
    return "\n".join([
        f"On {results['images']:,} images of {results['classes']} classes ({results['images_left_out']:,} left out), "
        f"{_code(results['data'])}, fingerprint\n{_code(results['data_fingerprint'])}:", "",
        "| top-1 | top-5 | loss | calibration error |", "|---|---|---|---|",
        f"| {results['top1']:.2f} % | {results['top5']:.2f} % | {_number(results['loss'], '.4f')} | "
        f"{_number(results['ece'], '.2f', ' %')} |"])


def _number(value: float | None, how: str, unit: str = "") -> str:
    return "not finite" if value is None else f"{value:{how}}{unit}"


def _use(network: nn.Module, is_named: bool) -> str:
    is_ours = type(network).__module__.startswith("vir.")
    lines = ["import timm", "import torch", "from PIL import Image",
             *(["import vir.models  # makes this model known to timm"] if is_ours else []), "",
             'model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"',
             "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
             'image = transform(Image.open("image.jpg").convert("RGB"))', "with torch.inference_mode():",
             "    probabilities = model(image[None]).softmax(dim=-1)[0]"]
    best = "int(probabilities.argmax())"
    lines += [f'print(model.pretrained_cfg["label_names"][{best}])' if is_named else f"print({best})"]
    return "\n".join(["```python", *lines, "```"])


def _repeat(metadata: WeightsMetadata, results: Mapping[str, Any] | None) -> str:
    training = ("Training: `vir-train --config config.yaml` with the config.yaml of the run, whose settings have the "
                f"SHA-256\n{_code(metadata.config_hash)}." if metadata.config_hash else
                "Training: the weights file does not say with which settings.")
    if results is None:
        return training
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{training}\n\nEvaluation: {_code(results['command'])}\n({versions})."


def _code(text: str) -> str:
    """As code in a line of Markdown, whatever is in it."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if fence == "`" else f"{fence} {line} {fence}"


def _read_json(file: Path, what: str, kinds: type | tuple[type, ...] = dict) -> Any:
    """Raises DataError where it cannot be read or is of another kind."""
    try:
        found = strict_json(read_regular(file, _MOST_JSON))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}; copy it again") from error
    except ValueError as error:
        raise DataError(f"{file} is not {what}: {error}; copy it again") from error
    if not isinstance(found, kinds):
        raise DataError(f"{file} is not {what}: it is a {type(found).__name__}; copy it again")
    return found
