"""2-D retention against the definition, in value and gradient, on awkward grids."""

from functools import lru_cache, partial

import pytest
import torch

from support.exactness import TOLERANCE, assert_close, assert_saturates, value_and_gradients
from vir.models.retention import _compute_dtype, retention_decay
from vir.models.retention_2d import chunkwise_retention_2d, parallel_retention_2d, recurrent_retention_2d

torch.set_num_threads(1)

BATCH, HEADS, KEY, VALUE = 2, 3, 8, 5

STATEFUL = {"recurrent": recurrent_retention_2d,
            **{f"chunkwise-{rows}": partial(chunkwise_retention_2d, chunk_rows=rows) for rows in (1, 2, 3, 100)}}


def only_output(form, *args, **kwargs):
    return form(*args, **kwargs)[0]


FORMS = {"parallel": parallel_retention_2d, **{name: partial(only_output, form) for name, form in STATEFUL.items()}}


@lru_cache
def decay_matrix(num_heads, grid, class_token):
    """Written from the definition, element by element, in Python's float64: [H, N, N]."""
    rows, columns = grid
    places = [(r, c) for r in range(rows) for c in range(columns)] + [(rows, columns - 1)] * class_token
    return torch.tensor([[[g ** (r - r2 + c - c2) if r2 <= r and c2 <= c else 0.0 for r2, c2 in places]
                          for r, c in places] for g in retention_decay(num_heads).tolist()], dtype=torch.float64)


def reference(q, k, v, grid, scale=KEY**-0.5):
    mask = decay_matrix(q.shape[1], grid, q.shape[2] - grid[0] * grid[1])
    return torch.einsum("bhik,bhjk,hij,bhjv->bhiv", q.double() * scale, k.double(), mask, v.double())


def inputs(num_tokens, dtype=torch.float64, batch=BATCH, heads=HEADS):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, num_tokens, width) for width in (KEY, KEY, VALUE)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("class_token", [0, 1])
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (7, 1), (3, 5), (5, 3), (8, 16), (14, 14)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_form_equals_the_definition_in_value_and_gradient(form, grid, class_token, dtype):
    decay, tensors = retention_decay(HEADS), inputs(grid[0] * grid[1] + class_token, dtype)
    found = value_and_gradients(lambda q, k, v: FORMS[form](q, k, v, decay, grid), tensors)
    assert all(x.dtype == dtype for x in found)
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    assert_close(found, value_and_gradients(partial(reference, grid=grid), tensors), TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_a_large_grid_equals_the_definition(form):
    grid, decay, tensors = (24, 32), retention_decay(1), inputs(24 * 32 + 1, torch.float32, batch=1, heads=1)
    expected = reference(*tensors, grid)
    assert_close([FORMS[form](*tensors, decay, grid)], [expected], 1e-5)


@pytest.mark.parametrize("grid", [(14, 14), (32, 32)], ids=str)
@pytest.mark.parametrize("form", ["parallel", "chunkwise-3"])
def test_bfloat16_is_as_exact_as_attention_in_bfloat16(form, grid):
    """Each against itself in float64, values and gradients; or at most one rounding of the result, 2^-8 of it.

    Where tokens are multiplied in bfloat16, keys, scores and states are rounded as well: four roundings.
    """
    tensors = [x.detach().bfloat16() for x in inputs(grid[0] * grid[1] + 1, batch=1)]

    def error(function):
        rounded = value_and_gradients(function, [x.clone().requires_grad_() for x in tensors])
        exact = value_and_gradients(function, [x.double().requires_grad_() for x in tensors])
        return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(rounded, exact, strict=True))

    attention = error(torch.nn.functional.scaled_dot_product_attention)
    rounding = 2**-8 if _compute_dtype(tensors[0]) == torch.float32 else 2**-6
    assert error(lambda *x: FORMS[form](*x, retention_decay(HEADS), grid)) <= max(attention, rounding)


@pytest.mark.parametrize("form", ["parallel", "chunkwise-2"])
def test_torch_compile_and_export_trace_the_form(form):
    decay, grid, tensors = retention_decay(HEADS), (5, 3), inputs(16)
    expected = value_and_gradients(lambda q, k, v: FORMS[form](q, k, v, decay, grid), tensors)
    compiled = torch.compile(lambda q, k, v: FORMS[form](q, k, v, decay, grid), backend="aot_eager", fullgraph=True)
    assert_close(value_and_gradients(compiled, tensors), expected, 1e-12)

    class Form(torch.nn.Module):
        def forward(self, q, k, v):
            return FORMS[form](q, k, v, decay, grid)

    tensors = tuple(x.detach() for x in tensors)
    exported = torch.export.export(Form(), tensors).module()
    assert_close([exported(*tensors)], expected[:1], 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_shifted_image_gives_shifted_outputs(form):
    """Content that moves two rows down and one column right takes its outputs along; in raster order it would not."""
    decay, small = retention_decay(HEADS), [x.detach().unflatten(2, (3, 4)) for x in inputs(12)]
    moved = [torch.zeros(BATCH, HEADS, 6, 7, x.shape[-1], dtype=x.dtype) for x in small]
    for x, y in zip(moved, small):
        x[:, :, 2:5, 1:5] = y
    out = FORMS[form](*(x.flatten(2, 3) for x in moved), decay, (6, 7)).unflatten(2, (6, 7))
    expected = FORMS[form](*(x.flatten(2, 3) for x in small), decay, (3, 4)).unflatten(2, (3, 4))
    assert_close([out[:, :, 2:5, 1:5]], [expected], 1e-12)


@pytest.mark.parametrize("strips", [(5,), (1, 1, 1, 1, 1), (2, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("form", STATEFUL)
def test_an_image_in_strips_equals_the_whole_in_value_and_gradient(form, strips):
    decay, grid = retention_decay(HEADS), (5, 3)

    def in_strips(q, k, v):
        state, outputs, top = None, [], 0
        for rows in (*strips, 0):  # at last the class token
            tokens = slice(top, top + max(rows * 3, 1))
            out, state = STATEFUL[form](q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], decay, (rows, 3),
                                        initial_state=state)
            outputs.append(out)
            top += rows * 3
        return torch.cat(outputs, dim=2)

    tensors = inputs(16)
    found = value_and_gradients(in_strips, tensors)
    assert_close(found, value_and_gradients(partial(reference, grid=grid), tensors), 1e-10)


@pytest.mark.parametrize("form", STATEFUL)
def test_the_state_is_the_last_row_of_states(form):
    q, k, v = inputs(12)
    _, state = STATEFUL[form](q, k, v, retention_decay(HEADS), (3, 4))
    for column in range(4):
        expected = sum(
            retention_decay(HEADS).double()[:, None, None] ** (2 - r + column - c)
            * k[:, :, r * 4 + c, :, None] * v[:, :, r * 4 + c, None, :]
            for r in range(3) for c in range(column + 1))
        assert_close([state[:, :, column]], [expected], 1e-10)


@pytest.mark.parametrize("form", STATEFUL)
def test_gradients_with_a_state_are_those_of_finite_differences(form):
    tensors = [x.detach().requires_grad_() for x in inputs(5, batch=1, heads=2)]
    state = torch.randn(1, 2, 2, KEY, VALUE, dtype=torch.float64, requires_grad=True)
    decay = retention_decay(2)
    torch.autograd.gradcheck(lambda q, k, v, s: STATEFUL[form](q, k, v, decay, (2, 2), initial_state=s),
                             (*tensors, state), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_scale_non_contiguous_inputs_and_an_empty_batch(form):
    decay, grid, tensors = retention_decay(HEADS), (4, 5), [x.detach() for x in inputs(21)]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert_close([FORMS[form](*strided, decay, grid, scale=0.3)], [reference(*tensors, grid, scale=0.3)], 1e-10)
    assert FORMS[form](*(x[:0] for x in tensors), decay, grid).shape == (0, HEADS, 21, VALUE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_near_and_autocast_changes_nothing(form, dtype):
    decay, grid, tensors = retention_decay(HEADS), (14, 14), [x.detach() for x in inputs(197, dtype)]
    out = FORMS[form](*tensors, decay, grid)
    assert out.dtype == dtype
    # The result is rounded once, and scores and states are on hardware with bfloat16 products: a few times 2^-9.
    assert_close([out], [reference(*tensors, grid)], 2**-6 if dtype == torch.bfloat16 else 2**-9)
    with torch.autocast("cpu", torch.bfloat16):
        assert FORMS[form](*tensors, decay, grid).equal(out)


@pytest.mark.parametrize("form", FORMS)
def test_float16_saturates_where_the_sum_is_finite(form):
    assert_saturates(partial(FORMS[form], decay=retention_decay(2), grid=(9, 11)))


def test_errors_name_the_value_and_the_way_out():
    decay, (q, k, v) = retention_decay(HEADS), inputs(13)
    with pytest.raises(ValueError, match="chunk_rows is 0; it must be at least 1 row"):
        chunkwise_retention_2d(q, k, v, decay, (3, 4), chunk_rows=0)
    for form in FORMS.values():
        with pytest.raises(ValueError, match=r"decay has shape \[2\] but q has 3 heads"):
            form(q, k, v, retention_decay(2), (3, 4))
        for grid in ((3, 5), (2, 4), (0, 12), (13, 0), (-1, 4)):
            with pytest.raises(ValueError, match=f"13 tokens do not fit a grid of {grid[0]} rows and {grid[1]} col"):
                form(q, k, v, decay, grid)
    for form in STATEFUL.values():
        with pytest.raises(ValueError, match=r"\[2, 3, 8, 5\]; for .* \[B, H, columns, K, V\] is \[2, 3, 4, 8, 5\]"):
            form(q, k, v, decay, (3, 4), initial_state=torch.zeros(2, 3, KEY, VALUE))
        with pytest.raises(ValueError, match=r"state is on meta but k is on cpu; move it: state.to\('cpu'\)"):
            form(q, k, v, decay, (3, 4), initial_state=torch.zeros(2, 3, 4, KEY, VALUE, device="meta"))
