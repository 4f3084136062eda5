"""The GPU kernels of retention against the definition, in value and gradient.

Without a GPU, the same tests run in Triton's interpreter (in a process of their own: it is chosen when the kernels are
defined), and the kernel is compiled for Ampere, Ada and Hopper ahead of time.
"""

import subprocess
import sys
from functools import lru_cache, partial
from types import SimpleNamespace

import pytest
import torch

from support.exactness import assert_close, assert_saturates, value_and_gradients
from support.launchers import call
from vir.models import kernels
from vir.models.kernels import fla_retention, fla_supports, fused_retention, fused_supports
from vir.models.retention import chunkwise_retention, parallel_retention, recurrent_retention, retention_decay
from vir.models.retention_2d import parallel_retention_2d

torch.set_num_threads(1)

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")

SCHEDULES = kernels._retention_kernel.configs
INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

BATCH, HEADS, KEY, VALUE = 2, 2, 24, 40

# In float32 the project's promise for all forms; below it, scores and outputs are cut once each to 8 or 11 bits (the
# interpreter and tensor cores cut off where other conversions round).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

GRIDS = {1: (1, 1), 2: (1, 1), 16: (5, 3), 63: (9, 7), 70: (23, 3), 197: (14, 14)}
"""Rows and columns for a number of tokens, with a class token where one is left over."""

CASES = [(num_tokens, torch.float32) for num_tokens in (1, 2, 16, 63, 197)]
CASES += [(70, torch.bfloat16), (70, torch.float16)]  # two tiles of 64


def on_device(tests):
    """Tests of a kernel itself: on a GPU, or in the interpreter, and never of the operators that replace it."""
    return pytest.mark.usefixtures("no_replacement")(tests if INTERPRETED else pytest.mark.gpu(tests))


@pytest.fixture
def no_replacement(monkeypatch):
    def give_up(name, error):
        raise error

    monkeypatch.setattr(kernels, "_give_up", give_up)
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        multiply = InterpreterBuilder.create_dot

        def multiply_numbers(self, *tiles_and_options):
            """Triton 3.9 would multiply the bits of bfloat16 as integers."""
            return multiply(self, *(self.cast_impl(x, triton.language.float32) if getattr(x, "dtype", None) is not None
                                    and x.dtype.scalar == triton.language.bfloat16 else x for x in tiles_and_options))

        monkeypatch.setattr(InterpreterBuilder, "create_dot", multiply_numbers)
        monkeypatch.setattr(kernels._retention_kernel, "configs", kernels._retention_kernel.configs[:1])  # none to time


@lru_cache
def decay_matrix(num_heads, num_tokens, grid):
    """Written from the definition, element by element, in Python's float64: [H, N, N]."""
    rows, columns = grid or (1, num_tokens)
    places = [(r, c) for r in range(rows) for c in range(columns)] + [(rows, columns - 1)]

    def weight(decay, i, j):
        down, right = places[i][0] - places[j][0], places[i][1] - places[j][1]
        return decay ** (down + right) if down >= 0 and right >= 0 else 0.0

    return torch.tensor([[[weight(decay, i, j) for j in range(num_tokens)] for i in range(num_tokens)]
                         for decay in retention_decay(num_heads).tolist()], dtype=torch.float64)


def reference(q, k, v, scale=None, grid=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = decay_matrix(q.shape[1], q.shape[2], grid).to(q.device) * scale
    return ((q.double() @ k.double().mT) * weights) @ v.double()


def inputs(num_tokens, dtype=torch.float32, device=None, key=KEY, value=VALUE, batch=BATCH, heads=HEADS):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, num_tokens, width) for width in (key, key, value)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device or DEVICE, dtype).requires_grad_()
            for s in shapes]


def assert_equals_the_definition(tensors, grid=None, run=None):
    if run is None:
        run = partial(fused_retention, decay=retention_decay(tensors[0].shape[1]).to(tensors[0].device), grid=grid)
    found = value_and_gradients(run, tensors)
    assert all(x.dtype == tensors[0].dtype for x in found)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = value_and_gradients(partial(reference, grid=grid), doubles)
    assert_close(found, expected, TOLERANCE[tensors[0].dtype])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_kernel_in_tritons_interpreter():
    done = call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestFused",
                timeout=280, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "skipped" not in done.stdout


@on_device
class TestFused:
    @pytest.mark.parametrize("two_d", [False, True], ids=["1d", "2d"])
    @pytest.mark.parametrize(("num_tokens", "dtype"), CASES, ids=str)
    def test_equals_the_definition_in_value_and_gradient(self, num_tokens, two_d, dtype):
        sizes = {"batch": 1, "heads": 1} if num_tokens > 100 else {}  # the interpreter is slow
        assert_equals_the_definition(inputs(num_tokens, dtype, **sizes), GRIDS[num_tokens] if two_d else None)

    @pytest.mark.parametrize(("width", "dtype"), [(16, torch.bfloat16), (80, torch.float32), (128, torch.bfloat16)])
    def test_takes_narrow_odd_and_wide_heads(self, width, dtype):
        assert_equals_the_definition(inputs(20, dtype, key=width, value=width, batch=1))

    def test_is_differentiable_twice(self):
        """The gradient of a sum of squared gradients, which no one-sided formula of the kernel could get right."""
        decay = retention_decay(HEADS).to(DEVICE)

        def squared_gradients(function, tensors):
            gradients = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in gradients), tensors)

        tensors = [x.detach() * 0.1 for x in inputs(19)]
        found, expected = ([x.to(dtype).requires_grad_() for x in tensors] for dtype in (torch.float32, torch.float64))
        assert_close(squared_gradients(partial(fused_retention, decay=decay, grid=(6, 3)), found),
                     squared_gradients(partial(reference, grid=(6, 3)), expected), 1e-5)

    def test_takes_the_views_of_a_joint_projection(self):
        num_tokens, width = 70, 16
        qkv = torch.randn(BATCH, num_tokens, 3 * HEADS * width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        views = qkv.unflatten(-1, (3, HEADS, width)).permute(2, 0, 3, 1, 4).unbind()
        assert not views[0].is_contiguous()
        assert_equals_the_definition([x.requires_grad_() for x in views])
        transposed = [x.mT.contiguous().mT.requires_grad_() for x in inputs(20)]
        assert transposed[0].stride(-1) != 1
        assert_equals_the_definition([x.detach().requires_grad_() for x in transposed])

    def test_takes_a_gradient_with_strides_of_zero(self):
        decay, tensors = retention_decay(HEADS).to(DEVICE), inputs(20)
        found = torch.autograd.grad(fused_retention(*tensors, decay).sum(), tensors)
        assert_close(found, torch.autograd.grad(reference(*tensors).sum(), tensors), 1e-5)

    def test_of_an_empty_batch_is_empty(self):
        decay, tensors = retention_decay(HEADS).to(DEVICE), inputs(20, batch=0)
        out, *gradients = value_and_gradients(partial(fused_retention, decay=decay), tensors)
        assert out.shape == (0, HEADS, 20, VALUE)
        assert [x.shape for x in gradients] == [x.shape for x in tensors]

    def test_scales_the_scores_and_lays_the_heads_of_a_token_together(self):
        decay, tensors = retention_decay(HEADS).to(DEVICE), inputs(20)
        out = fused_retention(*tensors, decay, scale=-0.3)
        assert_close([out], [reference(*tensors, scale=-0.3)], 1e-5)
        assert out.transpose(1, 2).is_contiguous()

    def test_scores_may_outgrow_float16(self):
        q = torch.full((1, 1, 20, 16), 300.0, device=DEVICE, dtype=torch.float16)  # q . k = 1,440,000
        v = torch.full_like(q, 1e-4)
        out = fused_retention(q, q, v, retention_decay(1).to(DEVICE), scale=1.0)
        assert_close([out], [reference(q, q, v, scale=1.0)], TOLERANCE[torch.float16])

    def test_saturates_float16_as_the_other_forms_do(self):
        assert_saturates(partial(fused_retention, decay=retention_decay(2).to(DEVICE)), DEVICE)

    @pytest.mark.parametrize("full", [False, True])
    def test_times_schedules_once_for_a_number_of_tokens_and_does_without_on_a_full_gpu(self, full, monkeypatch):
        timed = []

        def do_bench(run, quantiles):
            timed.append(run)
            if full:
                raise RuntimeError("Triton Error [CUDA]: out of memory")
            return [1 / len(timed)] * 3

        tuner = kernels._retention_kernel
        monkeypatch.setattr(triton.testing, "do_bench", do_bench)
        monkeypatch.setattr(tuner, "configs", SCHEDULES)
        monkeypatch.setattr(tuner, "cache", {})
        for batch, times in ((1, 3), (2, 3)):
            q, k, v = (x.detach() for x in inputs(20, batch=batch))
            assert_close([fused_retention(q, k, v, retention_decay(HEADS).to(DEVICE))], [reference(q, k, v)], 1e-5)
            assert len(timed) == times and tuner.best_config is SCHEDULES[0 if full else 2]
        fused_retention(*(x.detach() for x in inputs(21)), retention_decay(HEADS).to(DEVICE))
        assert len(timed) == 6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_decays_exactly_far_beyond_the_integers_of_bfloat16(self, dtype):
        one = torch.ones(1, 1, 300, 16, dtype=dtype, device=DEVICE)
        k = torch.zeros_like(one)
        k[:, :, 0, 0] = 1
        out = fused_retention(one, k, one, retention_decay(1).to(DEVICE), scale=1.0)[0, 0, :, 0]
        expected = (31 / 32) ** torch.arange(300, dtype=torch.float64, device=DEVICE)
        # Roundings of the score and of the output; one position off would be 3.2 %. In float32, the rounding of the
        # exponent, 299 log2(32/31) = 14, counts 14 times.
        assert ((out.double() - expected) / expected).abs().max() < (2e-6 if dtype == torch.float32 else 2**-6)

    def test_sees_nothing_of_later_tiles(self):
        q, k, v = (x.detach() for x in inputs(100, batch=1))
        changed = [x.clone() for x in (k, v)]
        for x in changed:
            x[:, :, 64:] = float("nan")
        decay = retention_decay(HEADS).to(DEVICE)
        assert fused_retention(q, *changed, decay)[:, :, :64].equal(fused_retention(q, k, v, decay)[:, :, :64])


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "_broken", {"fused", "fla"})


@pytest.mark.parametrize("grid", [None, (13, 3)], ids=["1d", "2d"])
def test_pytorch_takes_over_from_a_kernel_that_fails(monkeypatch, grid):
    def fail(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "_broken", set())
    monkeypatch.setattr(kernels, "_launch", fail)
    tensors = inputs(40, device="cpu")
    with pytest.warns(UserWarning, match="fused kernel.*RuntimeError: Failed to find C compiler") as caught:
        assert_equals_the_definition(tensors, grid)
        assert_equals_the_definition(inputs(40, torch.bfloat16, "cpu"), grid)
    assert len(caught) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("Triton Error [CUDA]: out of memory")], ids=["torch", "triton"])
def test_running_out_of_memory_is_no_failure_of_a_kernel(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(kernels, "_launch", fail)
    with pytest.raises(type(error), match="out of memory"):
        fused_retention(*inputs(4, device="cpu"), retention_decay(HEADS))
    assert "fused" not in kernels._broken


def test_pytorch_takes_over_from_fla(monkeypatch):
    monkeypatch.setattr(kernels, "_broken", set())
    monkeypatch.setitem(sys.modules, "fla", None)
    decay, tensors = retention_decay(HEADS), inputs(70, device="cpu")
    with pytest.warns(UserWarning, match="fla kernel.*ModuleNotFoundError"):
        found = fla_retention(*tensors, decay)
    assert_close(found, chunkwise_retention(*tensors, decay), 1e-6)


def test_the_operators_that_take_over_saturate_float16(without_kernels):
    assert_saturates(partial(fused_retention, decay=retention_decay(2)))


def test_the_operators_that_take_over_keep_their_precision(without_kernels):
    decay, tensors = retention_decay(HEADS), inputs(40, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert_close([fused_retention(*tensors, decay)], [reference(*tensors)], 1e-5)


@pytest.mark.parametrize("grid", [None, (13, 3)], ids=["1d", "2d"])
def test_fused_is_a_well_made_operator(without_kernels, grid):
    for reverse in (False, True):
        arguments = *inputs(40, device="cpu"), retention_decay(HEADS), 0.3, *(grid or (1, 40)), reverse, True
        torch.library.opcheck(kernels._retention, arguments)


def test_fused_and_the_predicates_are_traced_whole(monkeypatch, without_kernels):
    kernels._broken.clear()  # the predicates run to their ends
    monkeypatch.setattr(kernels, "_launch", lambda q, k, v, out, *rest: out.copy_(
        kernels._retention_by_pytorch(q, k, v, *rest[:-1])))

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            assert not fused_supports(q, v) and not fla_supports(q, v)
            return fused_retention(q, k, v, retention_decay(HEADS))

    tensors = inputs(40, device="cpu")
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    assert_equals_the_definition(tensors, run=lambda *tensors: compiled(*tensors))
    exported = torch.export.export(Model(), tuple(tensors))
    assert any("vir.retention" in str(node.target) for node in exported.graph.nodes)
    assert_close([exported.module()(*tensors)], [reference(*tensors)], 1e-5)


def test_predicates_name_what_each_kernel_is_made_for(monkeypatch, request):
    class Tensor(torch.Tensor):
        is_cuda = True

    def on_gpu(dtype, width=64):
        return torch.empty(1, 1, 4, width, dtype=dtype, device="meta").as_subclass(Tensor)

    monkeypatch.setattr(kernels, "_broken", set())
    monkeypatch.setattr(kernels, "_HAS_FLA", True)
    gpu = SimpleNamespace(major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    half, single = on_gpu(torch.bfloat16), on_gpu(torch.float32)
    assert fused_supports(half, half) and fused_supports(single, single)
    assert all(fused_supports(half, on_gpu(half.dtype, width)) for width in (16, 80, 128))
    assert not fused_supports(half, single) and not fused_supports(on_gpu(torch.float64), on_gpu(torch.float64))
    assert not any(fused_supports(half, on_gpu(half.dtype, width)) for width in (8, 65, 136))
    assert not fused_supports(*[torch.empty(1, 1, 4, 64)] * 2) and not fla_supports(*[torch.empty(1, 1, 4, 64)] * 2)
    assert fla_supports(half, half) and not fla_supports(on_gpu(torch.float16), on_gpu(torch.float16))
    assert not fla_supports(half[:0], half[:0]) and not fla_supports(half, on_gpu(half.dtype, 65))
    assert not fla_supports(single, single)  # its products would be TF32
    request.getfixturevalue("tf32")
    assert fla_supports(single, single)
    gpu.major = 7
    assert not fused_supports(half, half) and not fla_supports(half, half)
    gpu.major = 9
    seen = []
    torch.func.grad(lambda x: seen.extend([fused_supports(half, half), fla_supports(half, half)]) or x)(torch.ones(()))
    assert seen == [False, False]
    kernels._broken.update({"fused", "fla"})
    assert not fused_supports(half, half) and not fla_supports(half, half)


def test_errors_name_the_value_and_the_way_out():
    decay, (q, k, v) = retention_decay(HEADS), inputs(4, device="cpu")
    with pytest.raises(ValueError, match="not torch.float64, torch.float64 and torch.float64.*parallel_retention"):
        fused_retention(q.double(), k.double(), v.double(), decay)
    with pytest.raises(ValueError, match="K = 24 and V = 132"):
        fused_retention(q, k, v.new_zeros(BATCH, HEADS, 4, 132), decay)
    with pytest.raises(ValueError, match="4 tokens do not fit a grid of 3 rows"):
        fused_retention(q, k, v, decay, grid=(3, 3))
    with pytest.raises(ValueError, match=r"decay has shape \[3\]"):
        fused_retention(q, k, v, retention_decay(HEADS + 1))
    with pytest.raises(ValueError, match="state has shape"):
        fla_retention(q, k, v, decay, initial_state=torch.zeros(BATCH, HEADS, VALUE, KEY))


def test_models_do_without_triton_and_import_fla_only_to_use_it():
    code = ("import sys; sys.modules.update({'triton': None, 'triton.language': None})\n"
            "import torch, vir.models.kernels as kernels\n"
            "x = torch.randn(1, 2, 5, 16)\n"
            "print(kernels.fused_supports(x, x), kernels.fla_supports(x, x), 'fla' in sys.modules)\n"
            "kernels.fused_retention(x, x, x, torch.tensor([0.9, 0.8]))")
    done = call(sys.executable, "-c", code)
    assert done.returncode == 0, done.stdout
    assert "False False False" in done.stdout and "triton is not installed" in done.stdout


COMPILED = [  # architecture, dtype, precision of float32, width, reverse, number of the schedule
    (90, "bf16", "ieee", 64, False, 1),
    (90, "bf16", "ieee", 80, False, 0),
    (90, "bf16", "ieee", 128, True, 2),
    (90, "fp16", "tf32", 128, True, 2),
    (90, "fp32", "ieee", 64, False, 0),
    (90, "fp32", "ieee", 128, True, 2),
    (90, "fp32", "tf32", 64, False, 2),
    (80, "bf16", "ieee", 64, False, 1),
    (80, "fp16", "tf32", 128, False, 2),
    (80, "fp16", "tf32", 128, True, 0),
    (89, "bf16", "ieee", 128, False, 2),
    (89, "bf16", "ieee", 128, True, 0),
    (89, "fp16", "tf32", 128, True, 0),
    (89, "fp32", "ieee", 128, True, 0),
    (89, "fp32", "tf32", 128, True, 0),
]

SHARED_KIB = {80: 163, 89: 99, 90: 227}
"""Shared memory of a block: A100; L4, L40 and RTX 40; H100."""


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("architecture", "dtype", "precision", "width", "reverse", "schedule"), COMPILED)
def test_the_kernel_compiles_for_gpus(
    architecture, dtype, precision, width, reverse, schedule, tmp_path, monkeypatch, capfd
):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    try:
        subprocess.run([triton.knobs.nvidia.ptxas.path, "--version"], check=True)
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no ptxas: {error}")
    kernel, schedule = kernels._retention_kernel.fn, kernels._retention_kernel.configs[schedule]
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    constants = {"REVERSE": reverse, "SATURATE": dtype == "fp16",
                 **kernels._constants(width, width, torch_dtype, precision)}
    strides = ("i32", "i32", "i32", "constexpr")
    types = {"rates": "*fp32", "scale": "fp32", **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}"),
             **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, strides if name.endswith("_strides") else "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {}
    for place, name in enumerate(kernel.arg_names):
        if name.endswith("_strides"):
            values[place, 3] = 1
            aligned.update({(place, axis): [["tt.divisibility", 16]] for axis in range(3)})
        elif signature[name].startswith("*"):
            aligned[place,] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(kernel, signature, values, aligned), target=GPUTarget("cuda", architecture, 32),
                              options={"num_warps": schedule.num_warps, "num_stages": schedule.num_stages})
    assert compiled.asm["cubin"]
    tensor_cores = "wgmma" if architecture == 90 else "mma.sync"
    assert (tensor_cores in compiled.asm["ptx"]) == ((dtype, precision) != ("fp32", "ieee"))
    assert compiled.metadata.shared <= SHARED_KIB[architecture] * 1024
    assert " 0 bytes spill stores, 0 bytes spill loads" in "".join(capfd.readouterr())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fused_equals_pytorch_and_itself_on_the_gpu(dtype, no_replacement):
    decay = retention_decay(12).cuda()
    tensors = inputs(197, dtype, key=64, value=64, batch=8, heads=12)
    assert fused_supports(tensors[0], tensors[2])
    for grid in (None, (14, 14)):
        expected = value_and_gradients(partial(parallel_retention, decay=decay) if grid is None
                                       else partial(parallel_retention_2d, decay=decay, grid=grid), tensors)
        found = value_and_gradients(partial(fused_retention, decay=decay, grid=grid), tensors)
        assert_close(found, expected, TOLERANCE[dtype])
        again = value_and_gradients(partial(fused_retention, decay=decay, grid=grid), tensors)
        assert all(a.equal(b) for a, b in zip(found, again))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fla_equals_the_definition_on_the_gpu(dtype, tf32, no_replacement):
    pytest.importorskip("fla")
    decay, tensors = retention_decay(HEADS).cuda(), inputs(1025, dtype, key=64, value=64)
    state = torch.randn(BATCH, HEADS, 64, 64, device="cuda").requires_grad_()
    assert fla_supports(tensors[0], tensors[2])

    def joined(form, *tensors):
        return torch.cat([x.float().flatten() for x in form(*tensors[:3], decay, initial_state=tensors[3])])

    found = value_and_gradients(partial(joined, fla_retention), [*tensors, state])
    doubles = [x.detach().double().requires_grad_() for x in (*tensors, state)]
    expected = value_and_gradients(partial(joined, recurrent_retention), doubles)
    # TF32 has 11 bits; states are rounded to the inputs' precision at every chunk.
    assert_close(found, expected, {torch.float32: 2**-9, torch.bfloat16: 2**-6}[dtype])
