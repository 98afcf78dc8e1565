"""Export the merged classifier to ONNX, to run without PyTorch, and check its answers.

`model.onnx` takes batches of any size and length. `config.json`, which names the
classes, and the tokenizer are written beside it. `model.onnx` is kept only if ONNX
Runtime gives the same logits as the model for texts of different lengths.
"""

import argparse
import contextlib
import json
import logging
import time
import warnings
from pathlib import Path

TOLERANCE = 1e-3  # between two logits: a probability moves by 0.025 points at most
TEXTS = [
    "Good.",
    "A quiet film that stays with you for days.",
    "Two hours that I will never get back. " * 100,
]


def check_folder(folder: Path) -> None:
    """Check that `folder` holds a sequence classifier.

    Raises SystemExit: it does not; the message says how to get one.
    """
    path = folder / "config.json"
    config = {}
    with contextlib.suppress(OSError, ValueError):
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    found = "no model (config.json with `architectures`)"
    for name in config.get("architectures") or []:
        if name.endswith("ForSequenceClassification"):
            return
        found = f"a model of the class {name}"
    raise SystemExit(
        f"{folder} holds {found}; a sequence classifier is needed. Run the notebook,"
        " which writes one to outputs/merged, or name the folder of another."
    )


def example_batches(model, tokenizer) -> list:
    """Return inputs of different sizes and lengths, no longer than the model reads."""
    positions = getattr(model.config, "max_position_embeddings", 512) - 2
    longest = min(tokenizer.model_max_length, positions)
    batches = []
    for texts in (TEXTS[:2], TEXTS[1:], TEXTS[:1], TEXTS[2:]):
        batch = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        batches.append(batch)
    return batches


def export(folder: Path, target: Path) -> float:
    """Export the classifier in `folder` to `target`.

    Returns the largest difference between two logits. Raises SystemExit: a package is
    missing, or the difference is above the tolerance; then `model.onnx` is removed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, for torch.onnx
    except ImportError:
        raise SystemExit(
            "The export needs two more packages: pip install onnxscript onnxruntime"
        ) from None
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    # torch.onnx lists operators of packages that are not installed, and warns of its
    # own parts
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    model.eval()
    batches = example_batches(model, tokenizer)
    target.mkdir(parents=True, exist_ok=True)
    path = target / "model.onnx"
    program = torch.onnx.export(
        model,
        kwargs=dict(batches[0]),
        dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in batches[0]},
        input_names=list(batches[0]),
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    program.save(path)
    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    differences = []
    for batch in batches:
        with torch.inference_mode():
            expected = model(**batch).logits.numpy()
        inputs = {name: tensor.numpy() for name, tensor in batch.items()}
        (logits,) = session.run(["logits"], inputs)
        differences.append(abs(logits - expected).max())
    difference = torch.tensor(differences).max().item()
    if not difference <= TOLERANCE:  # nan is refused too
        path.unlink()
        raise SystemExit(
            f"The exported logits differ by up to {difference:.1e} (allowed:"
            f" {TOLERANCE:g}), so model.onnx was not kept."
        )
    model.config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return difference


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, export, and say what was written and how near it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default="outputs/merged",
        help="the classifier: %(default)s",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the folder to write to: onnx, beside the classifier's",
    )
    options = parser.parse_args(arguments)
    check_folder(options.folder)
    target = options.output or options.folder.parent / "onnx"
    start = time.monotonic()
    difference = export(options.folder, target)
    seconds = time.monotonic() - start
    path = target / "model.onnx"
    size = path.stat().st_size / 1e6
    print(f"{path}: {size:.1f} MB, exported and checked in {seconds:.0f} s.")
    print(
        f"Its logits differ from the model's by at most {difference:.1e}"
        f" (allowed: {TOLERANCE:g})."
    )


if __name__ == "__main__":
    main()
