"""The door: how samples are ordered where nobody said it, and what a run keeps of the URLs that it was given."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from support.http_server import HttpServer
from vir.config import DataConfig, ModelConfig, RunConfig, TrainConfig, dump_yaml
from vir.data.convert import Settings, convert
from vir.data.executors import Stopped
from vir.errors import DataError, SettingsError
from vir.run_folder import CONFIG
from vir.training.prepare import prepare


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """40 images in eight shards of about 17 kB."""
    root = tmp_path_factory.mktemp("data")
    for number in range(40):
        folder = root / "images" / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.JPEG")
    convert(root / "images", "train", root / "shards", Settings(samples_per_shard=5), workers=1)
    return root / "shards" / "train"


@pytest.fixture(scope="module")
def server(shards):
    with HttpServer({f"/train/{path.name}": path.read_bytes() for path in shards.iterdir()}) as server:
        yield server


@pytest.fixture
def config(tmp_path):
    """A function: the settings of a run of these images."""
    def of(train, **data):
        data = DataConfig(train=str(train), index_dir=str(tmp_path / "indexes"), timeout=5.0, **data)
        return RunConfig(output=str(tmp_path / "run"), deepspeed_config="zero2_fp32", data=data,
                         model=ModelConfig(name="resnet18"), train=TrainConfig(global_batch_size=8, micro_batch_size=4))
    return of


def test_without_a_cache_the_order_is_that_of_always(config, shards, server):
    for train in (shards, server.url("/train")):
        assert prepare(config(train)).config.data.order == (64, 2500)
    assert prepare(config(shards, cache="nowhere", cache_bytes="1")).config.data.order == (64, 2500)
    assert prepare(config(shards, lanes=3)).config.data.order == (3, 2500)


def test_a_new_run_takes_what_fits_its_cache_and_goes_on_with_it(config, shards, server, tmp_path):
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    cached = config(server.url("/train"), cache=str(tmp_path / "cache"), cache_bytes=str(size // 2))
    lanes, window = prepare(cached).config.data.order
    assert (lanes, window) == (1, 39)  # the least that is chosen
    began = prepare(cached).config
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(dump_yaml(began))
    assert prepare(config(shards)).config.data.order == (lanes, window)
    assert prepare(replace(config(shards), output=str(tmp_path / "other"), resume=str(tmp_path / "run"))
                   ).config.data.order == (lanes, window)
    assert prepare(replace(config(shards), output=str(tmp_path / "other"))).config.data.order == (64, 2500)
    with pytest.raises(SettingsError, match=f"began with other settings: data.lanes: {lanes} -> 9"):
        prepare(config(shards, lanes=9))


def test_secrets_of_urls_are_neither_kept_nor_told(config, server, tmp_path):
    url = server.url("/train", user="me:geheim") + "?X-Amz-Signature=geheim"
    ready = prepare(config(url))
    assert "geheim" not in ready.train.name and ready.config.data.train == url
    kept = dump_yaml(ready.config)
    with pytest.raises(SettingsError, match="was written without its secrets, as in config.yaml; give the whole URL"):
        prepare(config(yaml.safe_load(kept)["data"]["train"]))
    assert "geheim" not in kept and f"127.0.0.1:{server.port}/train" in yaml.safe_load(kept)["data"]["train"]
    assert not [path for path in (tmp_path / "indexes").rglob("*") if path.is_file() and b"geheim" in path.read_bytes()]
    with pytest.raises(DataError, match="--data.train: ") as caught:
        prepare(config(url.replace("/train", "/trains")))
    assert "geheim" not in str(caught.value)


def test_a_stop_ends_the_making_of_an_index(config, server, tmp_path):
    tars = server.url("/train/imagenet1k-train-{000000..000007}.tar")
    with pytest.raises(Stopped):
        prepare(config(tars), lambda: True)
    assert not list((tmp_path / "indexes").rglob("manifest.json"))
    assert len(prepare(config(tars)).train) == 40


@pytest.mark.parametrize("size", ["", "much", "-1GB", "0"])
def test_a_size_that_is_none_is_refused(config, shards, size):
    with pytest.raises(SettingsError, match=f"--data.cache_bytes is {size!r}; give a number of bytes above 0"):
        prepare(config(shards, cache_bytes=size))


def test_a_decoder_that_is_none_is_refused(config, shards, monkeypatch):
    monkeypatch.setenv("VIR_DECODER", "libjpeg")
    with pytest.raises(SettingsError, match="VIR_DECODER must be one of pillow, simplejpeg, nvimgcodec, got 'libjpeg'"):
        prepare(config(shards))


def test_weights_to_begin_from_are_a_file_or_a_folder_that_says_what_it_holds(config, shards, tmp_path):
    begun = config(shards)
    (tmp_path / "hub").mkdir()
    for path, said in ((tmp_path / "hub", "no config.json is in that folder; vir-consolidate makes a weights file of"),
                       (tmp_path / "w.pth", "no such file; give a .safetensors file of vir-consolidate, a timm check")):
        with pytest.raises(SettingsError, match=f"--model.init_from {path}: {said}"):
            prepare(replace(begun, model=ModelConfig(name="resnet18", init_from=str(path))))
    (tmp_path / "hub" / "config.json").write_text("{}")
    prepare(replace(begun, model=ModelConfig(name="resnet18", init_from=str(tmp_path / "hub"))))
