"""The settings of a run: one tree of frozen dataclasses, read from flags and YAML by jsonargparse.

Every field is a flag (`--optim.lr 1e-3`) and a YAML key (`optim: {lr: 1e-3}`); the sentence under a field is its
help text. What DeepSpeed's JSON owns (ZeRO stage, precision, offload, activation checkpointing) is not here, and what
the shard index or the model's default_cfgs know (sample counts, classes, mean and std) is not asked again.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Container, Literal, Mapping, Optional

import yaml

from vir.addresses import shown
from vir.errors import SettingsError

RetentionMode = Literal["auto", "parallel", "chunkwise", "recurrent"]
CropMode = Literal["center", "squash", "border"]
PRECISIONS = ("fp32", "bf16", "fp16")
"""Names of the floating-point types."""
_UNITS = {"": 1, "KB": 10**3, "KIB": 1 << 10,
          "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def _free(default: Any) -> Any:
    """A field that changes where a run lives or how fast it goes, never what it computes: free to change on resume."""
    return field(default=default, metadata={"free": True})


def check(holds: bool, flag: str, value: object, limit: str) -> None:
    """Raises SettingsError with the limit where it does not hold."""
    if not holds:
        raise SettingsError(f"--{flag} is {value!r}; it must be {limit}")


def check_positive(numbers: Mapping[str, float]) -> None:
    """Raises SettingsError with the name of the first that is not above 0, or infinite."""
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise SettingsError(f"{name} must be positive and finite, got {value:g}")


def check_timeout(flag: str, seconds: float) -> None:
    """Raises SettingsError where no server can be waited for so long, or one would be for ever."""
    check(0 < seconds < float("inf"), flag, seconds, "more than 0 seconds, and not infinite")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: any model that timm can create."""

    name: str = "vir_small_patch16_224"
    """Model name as timm.create_model knows it."""
    img_size: Optional[int] = None
    """Input side in pixels; the model's own default when not given."""
    mean: Optional[tuple[float, float, float]] = None
    """Mean of each channel in [0, 1] that images are normalised with; the model's own default when not given."""
    std: Optional[tuple[float, float, float]] = None
    """Standard deviation of each channel in [0, 1]; the model's own default when not given."""
    interpolation: Optional[Literal["bilinear", "bicubic"]] = None
    """Resize filter in evaluation; the model's own default when not given."""
    crop_pct: Optional[float] = None
    """Side of the crop in evaluation as a share of the resized image; the model's own default when not given."""
    crop_mode: Optional[CropMode] = None
    """How images become square in evaluation, by timm's names; the model's own default when not given."""
    init_from: str = ""
    """Weights to begin from: a .safetensors file, a timm checkpoint, a Hugging Face folder with timm's config.json; a
    head of other classes begins at random."""
    pretrained: bool = False
    """Begin from timm's own pretrained weights, fetched once into its cache; a head of another class count begins at
    random."""
    reset_head: bool = False
    """Begin with a head at random, also where that of init_from or pretrained fits."""
    freeze: Optional[str] = None
    """Regular expression of parameters not to train, from their names' start, e.g. 'patch_embed|blocks\\.[0-5]\\.'."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further architecture arguments for timm.create_model, e.g. --model.args '{patch_size: 4, depth: 6}'."""
    drop_path_rate: float = 0.0
    """Stochastic depth rate of the last block; earlier blocks scale linearly from 0."""
    retention_mode: RetentionMode = "auto"
    """Form of retention used in training; weights and results are the same in each."""
    chunk_size: int = 64
    """Tokens per chunk of the chunkwise form; auto has its own."""
    compile: bool = _free(False)
    """Compile each block with torch.compile: faster steps after a slow first one."""

    def __post_init__(self) -> None:
        check(self.img_size is None or self.img_size > 0, "model.img_size", self.img_size, "a positive pixel count")
        check(0 <= self.drop_path_rate < 1, "model.drop_path_rate", self.drop_path_rate, "in [0, 1)")
        check(self.chunk_size >= 1, "model.chunk_size", self.chunk_size, "at least 1 token")
        check(self.std is None or min(self.std) > 0, "model.std", self.std, "three positive numbers")
        check(self.crop_pct is None or 0 < self.crop_pct <= 1, "model.crop_pct", self.crop_pct, "in (0, 1]")
        try:
            re.compile(self.freeze or "")
        except re.error as error:
            raise SettingsError(f"--model.freeze is {self.freeze!r}; it must be a regular expression, but {error}"
                                ) from error
        if self.pretrained and self.init_from:
            raise SettingsError(f"--model.pretrained true and --model.init_from {self.init_from} are both given; a run "
                                "begins from one of them: leave the other out")
        if self.reset_head and not (self.pretrained or self.init_from):
            raise SettingsError("--model.reset_head is given and no weights to begin from are; give --model.init_from "
                                "or --model.pretrained, or leave it out: every head of a new run begins at random")
        for name in ("num_classes", "img_size", "drop_path_rate"):
            if name in self.args:
                raise SettingsError(f"--model.args sets {name!r}; " + (
                    "the class list of the training shards decides it" if name == "num_classes"
                    else f"use --model.{name}"))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are, and how they are read."""

    train: str = _free("")
    """Training images: a folder of shards, a folder of one folder per class, or shards anywhere, by URL, pattern or a
    list joined by ::, as s3://bucket/train-{0000..1023}.tar."""
    val: str = _free("")
    """Validation images, named in the same ways; their class list must equal the training one. Nothing is evaluated
    without them."""
    cache: str = _free("")
    """Folder on a disk of each machine, where shards from servers are kept; without it the images are read from the
    server one by one."""
    cache_bytes: str = _free("200GB")
    """The most that the folder may hold, of all runs that use it."""
    index_dir: str = _free("")
    """Folder for the indexes of shards that have none beside them; vir-at-scale/indexes in the user's cache folder when
    not given."""
    timeout: float = _free(300.0)
    """Seconds without an answer of a server, retries included, after which the run stops."""
    workers: Optional[int] = _free(None)
    """Loader processes per rank; changes speed only, never the data. What its share of the cores allows, at most 16,
    when not given."""
    prefetch: int = _free(4)
    """Micro-batches each worker prepares ahead; at least those of a step and one more."""
    lanes: Optional[int] = None
    """Shards read side by side; part of the definition of the sample order. When not given, 64, or with a cache what
    fits into it, chosen when the run begins."""
    window: Optional[int] = None
    """Samples over which a lane is shuffled; part of the definition of the sample order. When not given, 2500, or with
    a cache what fits into it, chosen when the run begins."""
    exclude: str = _free("")
    """File with a key in each line; a # at its start or after a space or tab begins a comment, unless it belongs to a
    key. Training goes on without these samples, each place of theirs is taken by a sample of the same class; a
    checkpoint remembers which ones they were."""
    max_bad_fraction: float = 0.001
    """Share of undecodable samples, replaced by substitutes, above which the run stops."""

    @property
    def order(self) -> tuple[int, int]:
        """Lanes and window, once they are chosen."""
        assert self.lanes is not None and self.window is not None, "chosen at the door"
        return self.lanes, self.window

    def __post_init__(self) -> None:
        check(self.workers is None or self.workers >= 1, "data.workers", self.workers,
              "at least 1: augmentation seeds its generators per sample and must not touch those of the trainer")
        check(self.prefetch >= 1, "data.prefetch", self.prefetch, "at least 1 micro-batch")
        check(self.lanes is None or self.lanes >= 1, "data.lanes", self.lanes, "at least 1")
        check(self.window is None or self.window >= 1, "data.window", self.window, "at least 1 sample")
        check_timeout("data.timeout", self.timeout)
        check(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What happens to training images; validation sees none of it."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area range of the random resized crop, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio range of the random resized crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.4
    """Strength of the colour jitter; timm leaves it out where auto_augment is on."""
    auto_augment: Optional[str] = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment/AutoAugment string, or null."""
    interpolation: str = "random"
    """Resize filter in training: random, bicubic or bilinear."""
    reprob: float = 0.25
    """Probability of random erasing."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """What random erasing fills in: zeros, one colour, or noise per pixel."""
    mixup: float = 0.8
    """Mixup alpha; 0 switches it off."""
    cutmix: float = 1.0
    """CutMix alpha; 0 switches it off."""
    mixup_prob: float = 1.0
    """Probability that a pair of samples is mixed."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix instead of mixup where both are on."""
    mixup_off_epoch: float = 0.0
    """Epoch from which samples are no longer mixed; 0: never."""

    @property
    def mixes(self) -> bool:
        """Whether pairs of samples are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def draws(self) -> bool:
        """Whether chance has a part in what becomes of an image; else it is the same in every epoch."""
        return (self.scale != (1, 1) or self.hflip > 0 or self.color_jitter > 0 or self.auto_augment is not None
                or self.interpolation == "random" or self.reprob > 0 or self.mixes)

    def __post_init__(self) -> None:
        check(0 < self.scale[0] <= self.scale[1] <= 1, "augment.scale", self.scale, "a range within (0, 1]")
        check(0 < self.ratio[0] <= self.ratio[1], "augment.ratio", self.ratio, "a range of positive numbers")
        check(self.interpolation in ("random", "bicubic", "bilinear"), "augment.interpolation", self.interpolation,
              "random, bicubic or bilinear")
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            check(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "a probability in [0, 1]")
        for name in ("color_jitter", "mixup", "cutmix", "mixup_off_epoch"):
            check(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A trained model that teaches this one (DeiT, arXiv:2012.12877)."""

    teacher: str = _free("")
    """Model of timm with its pretrained weights, by name, a weights file of vir-consolidate, or a folder that
    vir-export made of one; nobody teaches when not given."""
    kind: Literal["soft", "hard", "token"] = "hard"
    """soft: the student takes on the teacher's probabilities; hard: the class that it would choose; token: that class,
    by a token and a head of their own, which --model.args '{distilled: true}' gives."""
    alpha: float = 0.5
    """Weight of the teacher's part of the loss; that of the targets is 1 - alpha."""
    temperature: float = 1.0
    """By which both models' logits are divided before the softmax of soft."""

    def __post_init__(self) -> None:
        check(0 <= self.alpha <= 1, "distill.alpha", self.alpha, "in [0, 1]")
        check(self.temperature > 0, "distill.temperature", self.temperature, "positive")
        if self.temperature != 1 and self.kind != "soft":
            raise SettingsError(f"--distill.temperature {self.temperature} acts on soft alone; give --distill.kind "
                                "soft too")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning rate and weight decay."""

    name: str = "adamw"
    """timm's name of an optimizer; under ZeRO 1 to 3 one that treats each number alone."""
    lr: Optional[float] = None
    """Peak learning rate for the whole global batch; 1e-3 when neither lr nor lr_base is given."""
    lr_base: Optional[float] = None
    """Learning rate for lr_base_size samples, from which lr follows by the global batch size (timm's rule)."""
    lr_base_size: int = 256
    """Samples that lr_base is meant for."""
    lr_base_scale: Literal["linear", "sqrt"] = "linear"
    """How lr follows from lr_base: with the global batch size or with its square root."""
    weight_decay: float = 0.05
    """Decay of matrices; biases, norms, layer scale, class token and position table get none."""
    weight_decay_end: Optional[float] = None
    """Decay at the end of the run, reached along a cosine; constant when not given."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Averaging coefficients of Adam and its relatives."""
    momentum: float = 0.9
    """Momentum of SGD and its relatives."""
    eps: float = 1e-8
    """Epsilon of Adam and its relatives."""
    clip_grad: float = 1.0
    """Norm to which the gradient of a global batch is clipped; 0: not clipped."""
    layer_decay: Optional[float] = None
    """Factor between the learning rates of a layer and the one above it; the head has lr. All alike when not given."""

    def __post_init__(self) -> None:
        for name in ("lr", "lr_base", "lr_base_size", "eps", "layer_decay"):
            value = getattr(self, name)
            check(value is None or value > 0, f"optim.{name}", value, "positive")
        for name in ("weight_decay", "weight_decay_end", "clip_grad"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"optim.{name}", value, "0 or more")
        check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        check(0 <= self.momentum < 1, "optim.momentum", self.momentum, "in [0, 1)")
        check(self.layer_decay is None or self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "at most 1")
        if self.lr is not None and self.lr_base is not None:
            raise SettingsError(f"--optim.lr {self.lr} and --optim.lr_base {self.lr_base} are both given; lr is for "
                                "the whole global batch, lr_base for lr_base_size samples: set one of them to null")

    def peak_lr(self, global_batch_size: int) -> float:
        """lr, or what follows from lr_base by timm's rule: linear (arXiv:1706.02677) or with the square root."""
        if self.lr_base is None:
            return 1e-3 if self.lr is None else self.lr
        ratio = global_batch_size / self.lr_base_size
        return self.lr_base * (ratio if self.lr_base_scale == "linear" else ratio ** 0.5)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run: linear warm-up, a decay, a cool-down at min_lr."""

    name: Literal["cosine", "linear", "step", "constant"] = "cosine"
    """Form of the decay between warm-up and cool-down."""
    warmup_epochs: Optional[float] = None
    """Linear warm-up from warmup_lr to lr, in epochs; a fifteenth of the run, at most 20 epochs, when not given."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    min_lr: float = 1e-5
    """Learning rate at the end of the decay and during the cool-down."""
    cooldown_epochs: float = 0.0
    """Epochs at the end of the run that are spent at min_lr."""
    decay_epochs: float = 30.0
    """Epochs between the steps of the step schedule, counted from the end of warm-up."""
    decay_rate: float = 0.1
    """Factor at each step of the step schedule."""

    def __post_init__(self) -> None:
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"schedule.{name}", value, "0 or more")
        check(self.decay_epochs > 0, "schedule.decay_epochs", self.decay_epochs, "positive")
        check(0 < self.decay_rate <= 1, "schedule.decay_rate", self.decay_rate, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches, loss and seed."""

    epochs: float = 300.0
    """Length of the run in passes over the training set; it ends after ceil(epochs * samples / batch) steps."""
    steps: Optional[int] = None
    """Length of the run in optimizer steps, instead of epochs."""
    global_batch_size: int = 1024
    """Samples per optimizer step over all ranks."""
    micro_batch_size: int = 128
    """Samples per forward pass on one rank; accumulation follows as global / (micro * world)."""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """Softmax cross-entropy, or binary cross-entropy of each class alone (arXiv:2110.00476)."""
    bce_target_thresh: Optional[float] = None
    """Targets of bce above this become 1 and the others 0; as they are when not given."""
    smoothing: float = 0.1
    """Label smoothing."""
    linear_probe: bool = False
    """Train the classifier alone, on what the rest of the model makes of the images as it does in evaluation; where
    nothing is drawn in augment, that is computed once."""
    seed: int = 42
    """Seed of initialisation, order, augmentation and dropout."""
    tf32: bool = False
    """Let GPUs round float32 to TF32 in matrix products and convolutions: faster in fp32, errors of 1e-3. Half
    precision computes as before."""
    deterministic: bool = False
    """Compute the same bits each time, so that a resumed run on GPUs equals an uninterrupted one bit for bit; slower.
    An operator that cannot ends the run."""
    fast_dev_run: bool = _free(False)
    """Try everything in ten steps: train, evaluate ten batches, save, resume; in OUTPUT.fast_dev_run, then removed."""
    log_every: int = _free(50)
    """Steps between lines in metrics.jsonl."""
    wandb: str = _free("")
    """Project of Weights & Biases to log to as well; needs wandb installed."""
    profile: int = _free(0)
    """Steps of which each rank writes a torch profiler trace to RUN/profile, if it can after the first ten; 0: none."""
    peak_tflops: Optional[float] = _free(None)
    """Dense peak of one device in the training precision, in 1e12 FLOP/s, for MFU; known for common GPUs."""
    rank_timeout: float = _free(60.0)
    """Seconds of silence after which a rank counts as lost and the others end; a wait for data is told after as many.
    """

    def __post_init__(self) -> None:
        check(self.epochs > 0, "train.epochs", self.epochs, "positive")
        check(self.steps is None or self.steps >= 1, "train.steps", self.steps, "at least 1")
        check(self.global_batch_size >= 1, "train.global_batch_size", self.global_batch_size, "at least 1")
        check(self.micro_batch_size >= 1, "train.micro_batch_size", self.micro_batch_size, "at least 1")
        check(0 <= self.smoothing < 1, "train.smoothing", self.smoothing, "in [0, 1)")
        check(self.seed >= 0, "train.seed", self.seed, "0 or more")
        check(self.log_every >= 1, "train.log_every", self.log_every, "at least 1 step")
        check(self.profile >= 0, "train.profile", self.profile, "0 or more steps")
        check(self.peak_tflops is None or self.peak_tflops > 0, "train.peak_tflops", self.peak_tflops, "positive")
        check(self.rank_timeout >= 5, "train.rank_timeout", self.rank_timeout, "at least 5 seconds")
        thresh = self.bce_target_thresh
        check(thresh is None or 0 <= thresh < 1, "train.bce_target_thresh", thresh, "in [0, 1)")
        if thresh is not None and self.loss != "bce":
            raise SettingsError(f"--train.bce_target_thresh {thresh} acts on bce alone; give --train.loss bce too")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The average of the weights, kept beside them."""

    decay: float = 0.9998
    """Decay of the average of weights per applied update; 0: no average is kept."""
    warmup: bool = True
    """Start from a short average: the decay after update u is at most (1 + u) / (10 + u)."""

    def __post_init__(self) -> None:
        check(0 <= self.decay < 1, "ema.decay", self.decay, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during the run."""

    every_epochs: float = _free(1.0)
    """Epochs between evaluations on data.val; the end of the run is always evaluated."""
    every_steps: Optional[int] = _free(None)
    """Steps between evaluations, instead of every_epochs."""
    batch_size: int = _free(128)
    """Images per forward pass on one rank."""

    def __post_init__(self) -> None:
        check(self.every_epochs > 0, "eval.every_epochs", self.every_epochs, "positive")
        check(self.every_steps is None or self.every_steps >= 1, "eval.every_steps", self.every_steps, "at least 1")
        check(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept to continue from."""

    every_epochs: float = _free(1.0)
    """Epochs between checkpoints; the end of the run and a stop by signal are always saved."""
    every_steps: Optional[int] = _free(None)
    """Steps between checkpoints, instead of every_epochs."""
    every_minutes: Optional[float] = _free(10.0)
    """Minutes after the last checkpoint at which one is saved beside those; null: none is."""
    asynchronous: bool = _free(True)
    """Copy the state into host memory at the end of a step, and write it from there while training goes on; false:
    training waits until it is on the disk, which takes no memory."""
    local: str = _free("")
    """Folder on a disk of each node's own, such as an NVMe drive, that also keeps the newest checkpoint: the parts of
    that node's ranks and of the next node's. A run whose shared copy is older begins from these."""
    keep: int = _free(3)
    """Newest checkpoints to keep, of those of every_steps or every_epochs; and, unless this is 1, the last two."""
    keep_every_epochs: Optional[float] = _free(None)
    """Also keep, for good, the first checkpoint after each so many epochs."""
    best: Optional[Literal["top1", "ema_top1"]] = _free("top1")
    """Also keep the checkpoint with the best validation accuracy, saved right after its evaluation; null: do not."""

    def __post_init__(self) -> None:
        check(self.every_epochs > 0, "checkpoint.every_epochs", self.every_epochs, "positive")
        check(self.every_steps is None or self.every_steps >= 1, "checkpoint.every_steps", self.every_steps,
              "at least 1")
        check(self.every_minutes is None or self.every_minutes > 0, "checkpoint.every_minutes", self.every_minutes,
              "positive")
        check(self.asynchronous or not self.local, "checkpoint.local", self.local,
              "left out with --checkpoint.asynchronous false: it is written from the copy in host memory")
        check(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        check(self.keep_every_epochs is None or self.keep_every_epochs > 0, "checkpoint.keep_every_epochs",
              self.keep_every_epochs, "positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run."""

    deepspeed_config: str = _free("")
    """DeepSpeed JSON: ZeRO stage, precision, activation checkpointing. A path, or a shipped one's name: zero2_bf16.
    When not given zero2_bf16, on GPUs without bf16 zero2_fp16, on CPUs zero2_fp32."""
    device: Literal["auto", "cpu"] = _free("auto")
    """auto takes the GPUs, and CPUs on a machine without one; cpu takes CPUs on any machine."""
    output: str = _free("")
    """Run folder; the same command on it continues the run. runs/MODEL when not given."""
    resume: str = _free("auto")
    """auto continues the run in output, where there is one; none refuses a folder that has one; the path of another
    run or checkpoint (runs/a, runs/a/checkpoints/best) begins from there, on any number of ranks and any ZeRO stage,
    until output has its own."""
    dry_run: bool = _free(False)
    """Check and build everything, tell the plan with the memory and disk it needs, and stop before the first step."""
    validate_only: bool = _free(False)
    """Evaluate a checkpoint, or the weights to begin from, and stop."""
    which: str = _free("latest")
    """Checkpoint of the run that validate_only evaluates: latest, best, or the number of its step."""
    accept_config_change: bool = _free(False)
    """Continue a run folder although settings that change its results differ from those it began with."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if not self.data.train:
            raise SettingsError("--data.train is not given: a folder of shards, which vir-convert makes, or of "
                                "one folder per class, or the URL of shards; see --help data, or begin with bash "
                                "launch/quickstart.sh")
        if self.validate_only and not self.data.val:
            raise SettingsError("--validate_only has nothing to evaluate on: give --data.val")
        if self.train.fast_dev_run and (self.dry_run or self.validate_only) or self.dry_run and self.validate_only:
            raise SettingsError("--dry_run, --validate_only and --train.fast_dev_run exclude each other; keep one")
        if self.which != "latest" and self.resume == "none":
            raise SettingsError(f"--which {self.which} chooses among checkpoints, and --resume none takes none; leave "
                                "one of them out")
        if self.which != "latest" and not self.validate_only:
            raise SettingsError(f"--which {self.which} names what --validate_only evaluates; to train on from a "
                                "checkpoint give --resume RUN/checkpoints/best, or its folder, and another --output")
        if self.augment.mixes and self.train.micro_batch_size % 2:
            raise SettingsError(f"--train.micro_batch_size is {self.train.micro_batch_size}; mixup and cutmix pair "
                                "samples inside a micro-batch, so it must be even (or set --augment.mixup 0 "
                                "--augment.cutmix 0)")
        if self.train.linear_probe and self.model.freeze is not None:
            raise SettingsError(f"--train.linear_probe true and --model.freeze {self.model.freeze!r} are both given; a "
                                "linear probe trains the classifier and nothing else: leave one of them out")
        if self.train.linear_probe and self.distill.teacher:
            raise SettingsError(f"--train.linear_probe true and --distill.teacher {shown(self.distill.teacher)} are "
                                "both given; a linear probe learns from the classes alone: leave one of them out")
        if self.checkpoint.best == "ema_top1" and not self.ema.decay:
            raise SettingsError("--checkpoint.best is ema_top1, but --ema.decay 0 keeps no average; use top1 or null")
        if not self.distill.teacher and self.distill != DistillConfig():
            raise SettingsError("--distill.kind, --distill.alpha and --distill.temperature say how a teacher teaches; "
                                "name one by --distill.teacher, or leave them out")


def folder_of(config: RunConfig) -> Path:
    """The run folder."""
    return Path(config.output or f"runs/{config.model.name}")


def trains(config: RunConfig) -> bool:
    """Whether this is a run, and not a look at one."""
    return not (config.dry_run or config.validate_only)


def parse_bytes(text: str, flag: str) -> int:
    """The bytes of "200GB", "1.5 TiB" or "1000000".

    Raises:
        SettingsError: it is nothing of that kind, or less than one byte or more than any disk has; the flag is named.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text, re.IGNORECASE)
    unit = (found[2] or "").upper() if found else "?"
    size = float(found[1]) * _UNITS[unit] if found and unit in _UNITS else 0
    if not 1 <= size < 1 << 63:
        raise SettingsError(f"{flag} is {text!r}; give a number of bytes above 0, or one with MB, GB, TB, MiB, GiB or "
                            "TiB, such as 200GB")
    return int(size)


def plan_accumulation(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per rank and step.

    Raises:
        SettingsError: the global batch is not a multiple of micro batch times ranks; names the nearest that are.
    """
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass:
        below = global_batch_size // per_pass * per_pass
        nearest = " or ".join(str(size) for size in (below, below + per_pass) if size)
        raise SettingsError(f"--train.global_batch_size {global_batch_size} is not a multiple of "
                            f"--train.micro_batch_size {micro_batch_size} x {world_size} ranks = {per_pass}; "
                            f"nearest: {nearest}")
    return global_batch_size // per_pass


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain YAML and JSON types, without the secrets that URLs may hold."""
    return dict(_plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str) and "://" in value:
        return shown(value)
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def dump_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _settings(kind: Any, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """The settings under a dataclass by their names, e.g. data.workers."""
    found = {}
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.default_factory):
            found |= _settings(item.default_factory, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = item
    return found


SETTINGS = _settings(RunConfig)
FREE = frozenset(flag for flag, item in SETTINGS.items() if item.metadata.get("free"))
"""The settings with which a run folder may be continued although they differ from those it began with."""


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "",
                skips: Container[str] = FREE) -> list[str]:
    """`flag: before -> after` for each setting that changes the results of a run.

    One that `before` does not have is at its default there: the run began with a version that did not know it.

    Args:
        skips: settings that are not looked at.
    """
    changed = []
    for key in sorted(before.keys() | after.keys()):
        flag, new = prefix + key, after.get(key)
        old = before.get(key, {} if isinstance(new, dict) else _plain(SETTINGS[flag].default) if flag in SETTINGS else
                         None)
        if flag in skips or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changed += differences(old, new, flag + ".", skips)
        else:
            changed.append(f"{flag}: {old} -> {new}")
    return changed
