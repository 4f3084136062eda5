"""The three forms of retention against the definition, in value and gradient, at awkward sizes."""

from functools import lru_cache, partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.exactness import TOLERANCE, assert_close, value_and_gradients
from vir.models.retention import (
    _compute_dtype,
    chunkwise_retention,
    parallel_retention,
    recurrent_retention,
    retention_decay,
    retention_step,
)

torch.set_num_threads(1)

BATCH, HEADS, KEY, VALUE = 2, 3, 8, 5


def only_output(form, *args, **kwargs):
    return form(*args, **kwargs)[0]


FORMS = {
    "parallel": parallel_retention,
    "recurrent": partial(only_output, recurrent_retention),
    **{f"chunkwise-{c}": partial(only_output, chunkwise_retention, chunk_size=c) for c in (1, 7, 16, 64, 256)},
}
STATEFUL = {"recurrent": recurrent_retention,
            **{f"chunkwise-{c}": partial(chunkwise_retention, chunk_size=c) for c in (1, 7, 64)}}


@lru_cache
def decay_matrix(num_heads, num_tokens):
    """Written from the definition, element by element, in Python's float64: [H, N, N]."""
    rows = [[[g ** (i - j) if i >= j else 0.0 for j in range(num_tokens)] for i in range(num_tokens)]
            for g in retention_decay(num_heads).tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def reference(q, k, v, scale):
    mask = decay_matrix(q.shape[1], q.shape[2])
    return torch.einsum("bhik,bhjk,hij,bhjv->bhiv", q.double() * scale, k.double(), mask, v.double())


def inputs(num_tokens, dtype=torch.float64, batch=BATCH, heads=HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, num_tokens, width) for width in (KEY, KEY, VALUE)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def test_decay_is_the_formula_in_float32():
    expected = [0.96875, 0.98205, 0.98969, 0.99408, 0.99660, 0.99805]
    assert torch.allclose(retention_decay(6), torch.tensor(expected), rtol=0, atol=5e-6)
    assert retention_decay(12).dtype == torch.float32
    assert retention_decay(1).tolist() == [31 / 32]
    assert retention_decay(12)[-1].item() == 511 / 512


def test_decay_does_not_depend_on_the_default_dtype():
    expected = retention_decay(12)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert retention_decay(12).equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 63, 197])
@pytest.mark.parametrize("form", FORMS)
def test_form_equals_the_definition_in_value_and_gradient(form, num_tokens, dtype):
    decay, tensors = retention_decay(HEADS), inputs(num_tokens, dtype)
    found = value_and_gradients(lambda q, k, v: FORMS[form](q, k, v, decay), tensors)
    assert all(x.dtype == dtype for x in found)
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    expected = value_and_gradients(partial(reference, scale=KEY**-0.5), tensors)
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [577, 1025])
@pytest.mark.parametrize("form", FORMS)
def test_long_sequences_equal_the_definition(form, num_tokens, dtype):
    decay, tensors = retention_decay(2), inputs(num_tokens, dtype, batch=1, heads=2)
    found = value_and_gradients(lambda q, k, v: FORMS[form](q, k, v, decay), tensors)
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    assert_close(found, value_and_gradients(partial(reference, scale=KEY**-0.5), tensors), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_tokens", "chunk_size"), [
    (1, 1), (2, 1), (3, 1), (7, 1), (64, 1), (65, 1), (128, 1), (129, 1), (388, 3), (4096, 1), (12287, 3), (4097, 1)])
def test_any_number_of_chunks_equals_few_chunks_in_value_and_gradient(num_tokens, chunk_size, dtype):
    """Beyond 128 chunks, the state is carried from group to group; beyond 4,096, from group to group of groups."""
    decay, tensors = retention_decay(2), [*inputs(num_tokens, batch=1, heads=2), *inputs(KEY, batch=1, heads=2)[2:]]

    def run(chunk_size, q, k, v, state):
        out, state = chunkwise_retention(q, k, v, decay, chunk_size, state)
        return torch.cat([out.flatten(), state.flatten()])

    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    found = value_and_gradients(partial(run, chunk_size), tensors)
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    assert_close(found, value_and_gradients(partial(run, 512), tensors), TOLERANCE[dtype])


def test_the_work_of_small_chunks_grows_with_the_number_of_tokens():
    def multiplications(num_tokens):
        tensors = inputs(num_tokens, torch.float32, batch=1, heads=1)
        with FlopCounterMode(display=False) as counter:
            chunkwise_retention(*tensors, retention_decay(1), chunk_size=4)[0].sum().backward()
        return counter.get_total_flops()

    assert multiplications(32_768) < 8.5 * multiplications(4096)


@pytest.mark.parametrize("num_tokens", [197, 1025])
@pytest.mark.parametrize("form", ["parallel", "chunkwise-16", "chunkwise-64"])
def test_bfloat16_is_as_exact_as_attention_in_bfloat16(form, num_tokens):
    """Each against itself in float64, values and gradients; or at most one rounding of the result, 2^-8 of it.

    Where tokens are multiplied in bfloat16, keys, scores and states are rounded as well: four roundings.
    """
    q, k, v = (x.detach().bfloat16() for x in inputs(num_tokens, batch=2, heads=3))

    def error(function):
        rounded = value_and_gradients(function, [x.clone().requires_grad_() for x in (q, k, v)])
        exact = value_and_gradients(function, [x.double().requires_grad_() for x in (q, k, v)])
        return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(rounded, exact, strict=True))

    decay = retention_decay(3)
    attention = error(torch.nn.functional.scaled_dot_product_attention)
    rounding = 2**-8 if _compute_dtype(q) == torch.float32 else 2**-6
    assert error(lambda *x: FORMS[form](*x, decay)) <= max(attention, rounding)


@pytest.mark.parametrize("form", ["parallel", "chunkwise-7"])
def test_torch_compile_and_export_trace_the_form(form):
    decay, tensors = retention_decay(HEADS), inputs(20)
    expected = value_and_gradients(lambda q, k, v: FORMS[form](q, k, v, decay), tensors)
    compiled = torch.compile(lambda q, k, v: FORMS[form](q, k, v, decay), backend="aot_eager", fullgraph=True)
    assert_close(value_and_gradients(compiled, tensors), expected, 1e-12)

    class Form(torch.nn.Module):
        def forward(self, q, k, v):
            return FORMS[form](q, k, v, decay)

    tensors = tuple(x.detach() for x in tensors)
    exported = torch.export.export(Form(), tensors).module()
    assert_close([exported(*tensors)], expected[:1], 1e-12)


def test_torch_func_derives_the_chunkwise_form_for_each_sample_and_of_any_order():
    *tensors, state = (x.detach() for x in (*inputs(20), *inputs(KEY)[2:]))
    decay = retention_decay(HEADS)
    age = decay.double()[:, None, None] ** torch.arange(1, 21)[:, None]

    def whole(q, k, v, state):
        return parallel_retention(q, k, v, decay) + (q * KEY**-0.5 * age) @ state

    def chunks(q, k, v, state):
        return chunkwise_retention(q, k, v, decay, 7, state)[0]

    def derivatives(form):
        def loss(*sample):
            return form(*(x[None] for x in sample)).square().sum()

        first = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*tensors, state)
        second = torch.func.grad(lambda *x: sum(y.square().sum() for y in torch.func.grad(loss, (0, 1))(*x)), (1, 2))
        _, forward = torch.func.jvp(form, (*tensors, state), (*tensors, state))
        return [*first, *second(*(x[0] for x in (*tensors, state))), forward]

    assert_close(derivatives(chunks), derivatives(whole), 1e-10)


def test_the_backward_pass_ignores_autocast_too():
    decay, tensors = retention_decay(HEADS), inputs(20, torch.float32)
    expected = value_and_gradients(lambda q, k, v: FORMS["chunkwise-7"](q, k, v, decay), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(lambda q, k, v: FORMS["chunkwise-7"](q, k, v, decay), tensors)
    assert all(a.equal(b) for a, b in zip(found, expected))


@pytest.mark.parametrize("form", FORMS)
def test_scale_multiplies_the_scores(form):
    q, k, v = inputs(20)
    assert_close([FORMS[form](q, k, v, retention_decay(HEADS), scale=0.3)], [reference(q, k, v, 0.3)], 1e-10)


@pytest.mark.parametrize("split", [1, 30, 64, 100])
@pytest.mark.parametrize("form", STATEFUL)
def test_a_sequence_in_two_parts_equals_the_whole_in_value_and_gradient(form, split):
    run, decay = STATEFUL[form], retention_decay(HEADS)

    def in_parts(q, k, v):
        first, state = run(q[:, :, :split], k[:, :, :split], v[:, :, :split], decay)
        second, state = run(q[:, :, split:], k[:, :, split:], v[:, :, split:], decay, initial_state=state)
        return torch.cat([first.flatten(), second.flatten(), state.flatten()])

    def whole(q, k, v):
        out = parallel_retention(q, k, v, decay)
        age = decay.double()[:, None] ** torch.arange(100, -1, -1)
        state = torch.einsum("bhnk,bhnv,hn->bhkv", k, v, age)
        return torch.cat([out[:, :, :split].flatten(), out[:, :, split:].flatten(), state.flatten()])

    tensors = inputs(101)
    assert_close(value_and_gradients(in_parts, tensors), value_and_gradients(whole, tensors), 1e-10)


def test_a_step_continues_a_sequence():
    decay, (q, k, v) = retention_decay(HEADS), inputs(10)
    _, state = chunkwise_retention(q[:, :, :9], k[:, :, :9], v[:, :, :9], decay, chunk_size=4)
    out, state = retention_step(q[:, :, 9], k[:, :, 9], v[:, :, 9], decay, state)
    expected, expected_state = recurrent_retention(q, k, v, decay)
    assert_close([out, state], [expected[:, :, 9], expected_state], 1e-10)


@pytest.mark.parametrize("form", STATEFUL)
def test_gradients_with_a_state_are_those_of_finite_differences(form):
    tensors = [x.detach().requires_grad_() for x in inputs(5, batch=1, heads=2)]
    state = torch.randn(1, 2, KEY, VALUE, dtype=torch.float64, requires_grad=True)
    decay = retention_decay(2)
    torch.autograd.gradcheck(lambda q, k, v, s: STATEFUL[form](q, k, v, decay, initial_state=s), (*tensors, state))


@pytest.mark.parametrize("form", FORMS)
def test_non_contiguous_inputs_and_an_empty_batch(form):
    decay, tensors = retention_decay(HEADS), [x.detach() for x in inputs(20)]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert not strided[0].is_contiguous()
    assert_close([FORMS[form](*strided, decay)], [FORMS[form](*tensors, decay)], 1e-12)
    assert FORMS[form](*(x[:0] for x in tensors), decay).shape == (0, HEADS, 20, VALUE)


def test_the_state_after_a_short_last_chunk_is_finite_in_float32():
    q, k, v = inputs(2050, torch.float32, batch=1, heads=1)  # 2047 padded tokens: decay^-2047 would be 1e28
    _, state = chunkwise_retention(q, k, v, retention_decay(1), chunk_size=2049)
    _, expected = chunkwise_retention(q.double(), k.double(), v.double(), retention_decay(1), chunk_size=50)
    assert_close([state], [expected], 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_decays_exactly_far_beyond_its_256_integers(form):
    num_tokens = 600
    one = torch.ones(1, 1, num_tokens, 1, dtype=torch.bfloat16)
    k = torch.zeros_like(one)
    k[:, :, 0] = 1
    out = FORMS[form](one, k, one, retention_decay(1), scale=1.0)
    assert out.dtype == torch.bfloat16
    expected = (31 / 32) ** torch.arange(num_tokens, dtype=torch.float64)
    # At most four roundings of 2^-8 (aged key, state, aged query, output); one position off would be 3.2 %.
    assert ((out.double().flatten() - expected) / expected).abs().max() < 4 * 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", STATEFUL)
def test_states_are_float32_and_outgrow_float16(form, dtype):
    k = torch.full((1, 1, 70, 4), 100.0, dtype=dtype)
    out, state = STATEFUL[form](k * 1e-4, k, k, retention_decay(1))
    assert state.dtype == torch.float32 and out.dtype == dtype
    assert torch.isfinite(out).all() and torch.isfinite(state).all()
    assert state.max() > 65504


@pytest.mark.parametrize("form", FORMS)
def test_autocast_around_it_changes_nothing(form):
    decay, tensors = retention_decay(HEADS), inputs(20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = FORMS[form](*tensors, decay)
    assert inside.equal(FORMS[form](*tensors, decay))


def test_errors_name_the_value_and_the_way_out():
    decay, (q, k, v) = retention_decay(HEADS), inputs(4)
    with pytest.raises(ValueError, match="chunk_size is 0; it must be at least 1"):
        chunkwise_retention(q, k, v, decay, chunk_size=0)
    for form in FORMS.values():
        with pytest.raises(ValueError, match=r"decay has shape \[2\] but q has 3 heads.*retention_decay\(3\)"):
            form(q, k, v, retention_decay(2))
        with pytest.raises(ValueError, match=r"\[2, 3, 4, 8\], \[2, 3, 4, 8\] and \[2, 3, 3, 5\]"):
            form(q, k, v[:, :, :3], decay)
        with pytest.raises(ValueError, match="N >= 1"):
            form(q[:, :, :0], k[:, :, :0], v[:, :, :0], decay)
    for form in STATEFUL.values():
        with pytest.raises(ValueError, match=r"state has shape \[2, 3, 5, 8\].* is \[2, 3, 8, 5\]"):
            form(q, k, v, decay, initial_state=torch.zeros(2, 3, VALUE, KEY))
        with pytest.raises(ValueError, match=r"state is on meta but k is on cpu; move it: state.to\('cpu'\)"):
            form(q, k, v, decay, initial_state=torch.zeros(2, 3, KEY, VALUE, device="meta"))
