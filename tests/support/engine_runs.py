"""Many engines one after another in the ranks of one launch, because imports cost more than the steps.

usage: tests/support/engine_runs.py JOBS.json, in each rank   (a list of Job fields; see below)
"""

import itertools
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch

import vir.models  # noqa: F401  registers the models
from vir.config import AugmentConfig, DataConfig, EmaConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from vir.models.build import freeze
from vir.training.loss import training_loss

GLOBAL_BATCH = 24  # divides by 1, 2 and 3 ranks, times 4 micro-batches
CLASSES, SIZE = 5, 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine, trained from the start or from `restore`; its checkpoint and losses are left in `output`.

    With `save_first` the checkpoint is of before these steps. The images of the last rank are not numbers in the steps
    `nan`. `seed` is that of the initial weights.
    """

    output: str
    stage: int = 0
    precision: str = "fp32"
    accumulation: int = 1
    recompute: bool = False
    ema: float = 0.9
    first: int = 0
    steps: int = 3
    restore: str = ""
    save_first: bool = False
    optim: dict = field(default_factory=dict)
    zero: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    model: str = "vir_tiny_patch16_224"
    drop_path_rate: float = 0.2
    args: dict = field(default_factory=lambda: dict(img_size=SIZE, patch_size=4, embed_dim=24, depth=2, num_heads=2))
    classes: int = CLASSES
    scale_power: int = 8
    scale_window: int = 1000
    compile: bool = False
    freeze: str = ""
    nan: list = field(default_factory=list)
    seed: int = 0

    def config(self, ranks: int = 1) -> RunConfig:
        return RunConfig(
            deepspeed_config="matrix", output=self.output, data=DataConfig(train="t", val="v"),
            augment=AugmentConfig(mixup=0, cutmix=0), model=ModelConfig(compile=self.compile),
            train=TrainConfig(global_batch_size=GLOBAL_BATCH,
                              micro_batch_size=GLOBAL_BATCH // ranks // self.accumulation),
            optim=OptimConfig(lr=1e-2, **self.optim), ema=EmaConfig(decay=self.ema))

    def ds_config(self) -> dict:
        found = {"zero_optimization": {"stage": self.stage, **self.zero}}
        if self.precision != "fp32":
            found[self.precision] = {"enabled": True}
        if self.precision == "fp16":
            found["fp16"] |= {"initial_scale_power": self.scale_power, "hysteresis": 1,
                              "loss_scale_window": self.scale_window}
        return found | self.settings | ({"activation_checkpointing": {}} if self.recompute else {})

    def build(self) -> torch.nn.Module:
        torch.manual_seed(self.seed)
        model = timm.create_model(self.model, num_classes=self.classes, drop_path_rate=self.drop_path_rate, **self.args)
        if self.freeze:
            freeze(model, self.freeze)
        return model


def batch(step: int, classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and soft targets of a global batch."""
    numbers = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, SIZE, SIZE, generator=numbers)
    return images, torch.randn(GLOBAL_BATCH, classes, generator=numbers).softmax(1)


def seed_of(step: int, first_sample: int) -> int:
    """Of DropPath, for the micro-batch that begins at a place of the global batch."""
    return 1000 * step + first_sample


def counting(kept: list[int]) -> torch.autograd.graph.saved_tensors_hooks:
    """Adds the bytes of each tensor that autograd keeps for the backward pass; recomputed ones are not kept."""
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def begin_to_save(engine, job: Job, done: int, world):
    """A checkpoint that is written while the engine goes on; to be finished."""
    from vir.checkpoints import store
    from vir.checkpoints.info import CheckpointInfo
    from vir.checkpoints.saving import Checkpointer
    from vir.weights.spec import InputSpec, ModelSpec

    spec = ModelSpec(name=job.model, args={**job.args, "num_classes": job.classes}, classes=(), input=InputSpec(
        size=(3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0))
    info = CheckpointInfo(
        samples_seen=done * GLOBAL_BATCH, step=done, updates=engine.updates, world_size=world.size,
        zero_stage=job.stage, precision=job.precision, ema=engine.has_ema, loss_scaler=engine.loss_scale.state(),
        metrics={}, config={}, model=spec, data_fingerprint="")
    checkpoints = Checkpointer(Path(job.output), world, store.Kept(1, None), asynchronous=True)
    checkpoints.begin(engine.save, info, is_best=False)
    return checkpoints


def refused(engine) -> bool:
    """Whether the engine does not save what a checkpoint would lose."""
    try:
        engine.save(Path("nowhere"), lambda state, path: None)
    except AssertionError as error:
        return "finish the global batch first" in str(error)
    return False


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of float32; the padding of a rank's part may hold anything, also what is not a number and equals nothing."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def run(job: Job) -> None:
    from vir import arithmetic, distributed
    from vir.checkpoints import store
    from vir.checkpoints.partitions import EMA, Partitions
    from vir.engine.engine import Engine, Update
    from vir.errors import LossScaleError, SettingsError

    world = distributed.start()
    arithmetic.set_up(deterministic=world.device.type == "cuda")  # CPUs are so by themselves
    engine = Engine(job.build(), job.config(world.size), job.ds_config(), job.accumulation)
    if job.restore:
        folder, info = store.select(Path(job.restore), world)
        try:
            engine.restore(Partitions(folder, info), info)
        except SettingsError as error:
            (Path(job.output) / f"refused{world.rank}.txt").write_text(str(error))
            return engine.close()
    if job.save_first:
        checkpoints = begin_to_save(engine, job, job.first, world)
    forwards, kept = [], []
    block = next(module for name, module in engine.module.named_modules() if name in ("blocks.0", "stages.0", "layer1"))
    # recomputation stops before a block ends
    block.register_forward_pre_hook(lambda block, _: forwards.append(1) if block.training else None)

    def evaluate() -> tuple[torch.Tensor, torch.Tensor]:
        logits, images = [], batch(0)[0].to(world.device)
        for average in (True, False):
            with engine.evaluating(averaged=average) as forward:
                logits.append(forward(images).float())
        engine.deepspeed.eval()
        for use, expected in ((engine.use_average, logits[0]), (engine.use_weights, logits[1])):
            use()
            use()  # one call too many changes nothing
            with torch.no_grad():
                assert torch.equal(engine(images).float(), expected)
        engine.deepspeed.train()
        return logits

    def held() -> list[torch.Tensor]:
        """Copies of this rank's part of weights and average."""
        return [tensor.clone() for piece in engine._layout.pieces()
                for tensor in (piece.master.detach(), engine._optimizer.state[piece.master].get(EMA))
                if tensor is not None]

    def live() -> list[dict[str, torch.Tensor]]:
        """Weights and average of what is trained, flat and whole, out of the optimizers of all ranks."""
        mine = []
        for piece in engine._layout.pieces():
            if piece.start == piece.stop:
                continue
            kept = (piece.master.detach(), engine._optimizer.state[piece.master].get(EMA))
            mine.append((piece.name, piece.start, [
                None if tensor is None else tensor.reshape(-1)[piece.offset:piece.offset + piece.stop - piece.start]
                .cpu().clone() for tensor in kept]))
        whole = [{}, {}]
        for name, start, parts in sorted(itertools.chain(*distributed.gather(mine)), key=lambda part: part[:2]):
            for found, part in zip(whole, parts):
                if part is not None and (not start or job.stage):  # without ZeRO each rank has all
                    found[name] = torch.cat([found[name], part]) if start else part
        return whole

    def floats() -> dict[str, torch.Tensor]:
        return {name: buffer.cpu() for name, buffer in engine.module.named_buffers() if buffer.is_floating_point()}

    events, micro, in_between = [], GLOBAL_BATCH // world.size // job.accumulation, []
    for step in range(job.first, job.first + job.steps):
        images, targets = (tensor.to(world.device) for tensor in batch(step, job.classes))
        if step in job.nan:
            images[-GLOBAL_BATCH // world.size:] = float("nan")
        before = held() if job.nan else []
        total = 0.0
        scale = engine.loss_scale.value
        for index in range(job.accumulation):
            start = (world.rank * job.accumulation + index) * micro
            torch.manual_seed(seed_of(step, start))
            with counting(kept) if not job.compile else nullcontext():
                logits = engine(images[start:start + micro])
            loss = training_loss(logits, targets[start:start + micro], job.config().train)
            engine.backward(loss)
            try:
                update = engine.step(1e-2, job.config().optim.weight_decay)
            except LossScaleError:
                update = None
            if update is Update.ACCUMULATING:
                in_between.append(refused(engine))
            total += float(loss.detach())
        mean = sum(distributed.gather(total)) / world.size / job.accumulation
        if job.recompute:  # whose losses are compared with those of a run that is not interrupted
            evaluate()
        events.append({"loss": mean, "norm": engine.grad_norm(), "applied": update is Update.APPLIED, "scale": scale})
        if job.nan:
            events[-1]["of ranks"] = distributed.gather((
                update and update.name, all(map(same_bits, before, after := held())) and len(before) == len(after)))
    averaged, logits = (None, None) if job.save_first else (logits.cpu() for logits in evaluate())
    if not job.save_first:
        checkpoints = begin_to_save(engine, job, job.first + job.steps, world)
    buffers, whole = distributed.gather(floats()), live()
    if world.is_main:
        torch.save({"events": events, "live": whole, "refused": in_between, "buffers": buffers,
                    "forwards": len(forwards), "kept": sum(kept), "logits": logits,
                    "averaged": averaged}, Path(job.output) / "result.pt")
    checkpoints.finish()
    engine.close()


def write(path: Path, jobs: list[Job]) -> Path:
    for job in jobs:
        Path(job.output).mkdir(parents=True)
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    return path


if __name__ == "__main__":
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":  # slow there, but it computes, and scales the loss, as on a GPU
        get_accelerator().is_fp16_supported = lambda: True
    for fields in json.loads(Path(sys.argv[-1]).read_text()):
        run(Job(**fields))
