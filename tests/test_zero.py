"""What a step does with one number that is not finite, and what it asks of the device, in each layout of DeepSpeed."""

import math

import pytest
import torch

from support.dispatches import Dispatches
from support.engine_runs import Job, batch
from vir.engine.zero import LAYOUTS

torch.set_num_threads(1)
JOBS = [dict(stage=stage, precision=precision) for stage in LAYOUTS for precision in ("fp32", "bf16", "fp16")]
JOBS += [dict(stage=stage, precision=precision, zero={"offload_optimizer": {"device": "cpu"}})
         for stage, precision in ((1, "fp16"), (2, "bf16"), (3, "fp16"))]

MOST = {0: (10, 4), 1: (4, 3), 2: (4, 3), 3: (4, 2)}
"""By stage: the most operators per parameter that a step launches, and the most waits.

DeepSpeed's own search for numbers that are not finite takes 12 operators more and, without ZeRO, a wait per parameter.
In stages 1 and 2 one of these is for the device; the others read the norm again, which lies in the host's memory then.
"""


class Trial:
    """An engine whose gradients can be spoiled in one number."""

    def __init__(self, path, monkeypatch, **job):
        from deepspeed.accelerator import get_accelerator

        from vir.engine.engine import Engine

        if get_accelerator().device_name() == "cpu":
            monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        job = Job(output=str(path), args=dict(img_size=8, patch_size=4, embed_dim=24, depth=4, num_heads=2),
                  drop_path_rate=0.0, **job)
        model = job.build()
        self.names = [name for name, _ in model.named_parameters()]
        self.spoiled, self.by, self.offloads = "", 0.0, bool(job.zero)
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: self._spoil(name, gradient))
        self.engine = Engine(model, job.config(), job.ds_config(), 1)

    def _spoil(self, name, gradient):
        if name != self.spoiled:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[-1] = self.by
        return gradient

    def backward(self):
        images, targets = batch(0)
        self.engine.backward((self.engine(images) - targets).float().square().mean())

    def masters(self):
        return [piece.master.detach().clone() for piece in self.engine._layout.pieces()]

    def step(self):
        return self.engine.step(1e-2, 0.05).name


@pytest.fixture
def trial(request, tmp_path, monkeypatch, alone):
    trial = Trial(tmp_path, monkeypatch, **request.param)
    yield trial
    trial.engine.close()


@pytest.mark.parametrize("trial", JOBS, indirect=True, ids=lambda job: "-".join(map(str, job.values()))[:14])
def test_one_number_that_is_not_finite_is_enough_to_skip_a_step(trial):
    first, last = trial.names[0], trial.names[-1]
    for trial.spoiled, trial.by in ((first, math.inf), (first, math.nan), (last, -math.inf), (last, math.nan)):
        before = trial.masters()
        trial.backward()
        assert trial.step() == "SKIPPED"
        assert all(map(torch.equal, before, trial.masters()))
        assert not trial.engine.grad_norm() < math.inf
    trial.spoiled = ""
    trial.backward()
    assert trial.step() == "APPLIED"
    assert 0 < trial.engine.grad_norm() < math.inf
    assert not all(map(torch.equal, before, trial.masters()))

    trial.backward()
    with Dispatches() as counted:
        assert trial.step() == "APPLIED"
    if not trial.offloads:  # whose optimizer works on the host
        most = MOST[trial.engine.zero_stage]
        assert counted.launches <= most[0] * len(trial.names) + 30 and counted.waits <= most[1]
