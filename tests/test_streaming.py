"""forward_stream: the logits of forward from strips of an image, whatever their height."""

import pytest
import torch

from vir.errors import SettingsError
from vir.models import VisionRetention

torch.set_num_threads(1)

IMAGES = torch.randn(2, 3, 64, 40, generator=torch.Generator().manual_seed(2))  # 8 x 5 patches


def stream_model(**kwargs):
    torch.manual_seed(0)
    args = dict(img_size=(64, 40), patch_size=8, num_classes=5, embed_dim=32, depth=3, num_heads=2)
    model = VisionRetention(**args | kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("stream_tokens", [1, 12, 1024], ids=["a row of patches", "two rows", "all at once"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("global_pool", ["token", "avg", "max", "avgmax"])
def test_a_stream_gives_the_logits_of_the_whole(global_pool, dims, stream_tokens, monkeypatch):
    monkeypatch.setattr("vir.models.vision_retention.STREAM_TOKENS", stream_tokens)
    model = stream_model(global_pool=global_pool, retention_dims=dims, retention_norm="layernorm")
    expected = model(IMAGES)
    for strips in (IMAGES, iter([IMAGES]), IMAGES.split(1, dim=2), IMAGES.split([3, 40, 20, 1], dim=2)):
        found = model.forward_stream(strips)
        assert not found.requires_grad
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_stream_reads_a_strip_when_it_needs_it(monkeypatch):
    monkeypatch.setattr("vir.models.vision_retention.STREAM_TOKENS", 5)
    model, log = stream_model(), []
    extend = model.blocks[-1].extend
    monkeypatch.setattr(model.blocks[-1], "extend", lambda *args: log.append("block") or extend(*args))

    def strips():
        for strip in IMAGES.split(8, dim=2):
            log.append("read")
            yield strip

    model.forward_stream(strips())
    assert log == ["read", "block"] * 8 + ["block"], "each strip passes through all layers before the next is read"


@pytest.mark.parametrize("dims", [1, 2])
def test_a_stream_of_dynamic_size_and_padding(dims):
    model = stream_model(retention_dims=dims, dynamic_img_size=True, dynamic_img_pad=True)
    images = torch.randn(1, 3, 90, 53)
    expected = model(images)
    for found in (model.forward_stream(images), model.forward_stream(images.split(17, dim=2), img_size=(90, 53))):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (5, 3), (2, 2), (40, 7), (13, 50)], ids=str)
def test_positions_are_resampled_for_a_strip_at_a_time(grid):
    """Into larger and smaller grids; the same as for the whole but for rounding, 1e-8 here."""
    model = stream_model(img_size=(24, 40), dynamic_img_size=True)
    strips = model._position_strips(grid, 2)
    assert next(strips).shape == (1, min(2, grid[0]) * grid[1], 32)
    found = torch.cat(list(model._position_strips(grid, 2)), dim=1)
    assert (found - model._position_embedding(grid)).abs().max() < 1e-6


@pytest.mark.parametrize("args", [{}, dict(distilled=True), dict(global_pool="avg"), dict(global_pool="max"),
                                  dict(global_pool="avgmax")], ids=str)
def test_a_stream_gives_what_the_head_reads(args):
    model = stream_model(**args)
    expected = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    found = model.forward_head(model.forward_stream_features(IMAGES.split(9, dim=2)), pre_logits=True)
    assert found.shape == (2, 32) and (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_stream_in_bfloat16():
    model = stream_model().bfloat16()
    expected = model(IMAGES.bfloat16()).float()
    found = model.forward_stream(IMAGES.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_strips_that_make_no_image_are_refused():
    model = stream_model()
    with pytest.raises(ValueError, match="strips end at row 40 of an image of 64 rows"):
        model.forward_stream(IMAGES[:, :, :40].split(8, dim=2))
    with pytest.raises(ValueError, match="strips end at row 0 of"):
        model.forward_stream([])
    with pytest.raises(ValueError, match=r"shape \[2, 3, 8, 40\] ends at row 72; .* any height, 40\] and 64 rows"):
        model.forward_stream([IMAGES, IMAGES[:, :, :8]])
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 39\] ends at row 8; strips must be \[2, 3, any height, 40\]"):
        model.forward_stream([IMAGES[:, :, :8, 1:]])
    with pytest.raises(ValueError, match=r"\[1, 3, 8, 40\] ends at row 16; strips must be \[2, 3"):
        model.forward_stream([IMAGES[:, :, :8], IMAGES[:1, :, 8:16]])
    with pytest.raises(SettingsError, match="images are 32x40 but this model takes 64x40"):
        model.forward_stream(IMAGES[:, :, :32])


def test_a_stream_needs_eval_mode_and_a_pool():
    with pytest.raises(SettingsError, match="needs model.eval"):
        stream_model().train().forward_stream(IMAGES)
    with pytest.raises(SettingsError, match="global_pool cannot be ''; choose token or avg"):
        stream_model(global_pool="").forward_stream(IMAGES)
