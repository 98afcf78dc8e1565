"""Export the merged classifier to ONNX, to run without PyTorch, and check its answers against the model's.

`model.onnx` takes batches of any size and length. Beside it come `config.json`, which names the classes, and the
tokenizer. It is kept only if ONNX Runtime gives the same logits for texts of different lengths.
"""

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

TOLERANCE = 1e-3  # between two logits: a probability moves by 0.025 points at most
TEXTS = ["Good.", "A quiet film that stays with you for days.", "Two hours that I will never get back. " * 100]


def check_folder(folder: Path) -> None:
    """Check that `folder` holds a sequence classifier.

    Raises:
        SystemExit: it does not; the message says how to get one.
    """
    path = folder / "config.json"
    classes = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [] if path.is_file() else []
    if not any(name.endswith("ForSequenceClassification") for name in classes):
        found = f"a model of the class {classes[0]}" if classes else "no model (config.json with `architectures`)"
        raise SystemExit(
            f"{folder} holds {found}; a sequence classifier is needed. Run the notebook, which writes one to"
            " outputs/merged, or name the folder of another."
        )


def export(folder: Path, target: Path) -> float:
    """Export the classifier in `folder` to `target` and return the largest difference between two logits.

    Raises:
        SystemExit: a package is missing, or the difference is above the tolerance; then `model.onnx` is removed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, for torch.onnx
    except ImportError:
        raise SystemExit("The export needs two more packages: pip install onnxscript onnxruntime") from None
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists operators of packages that are not installed,
    warnings.simplefilter("ignore")  # and warns of its own parts
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512) - 2)
    batches = [TEXTS[:2], TEXTS[1:], *([text] for text in TEXTS)]
    batches = [tokenizer(b, padding=True, truncation=True, max_length=longest, return_tensors="pt") for b in batches]
    target.mkdir(parents=True, exist_ok=True)
    program = torch.onnx.export(
        model,
        kwargs=dict(batches[0]),
        dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in batches[0]},
        input_names=list(batches[0]),
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    program.save(target / "model.onnx")
    session = onnxruntime.InferenceSession(str(target / "model.onnx"), providers=["CPUExecutionProvider"])
    differences = []
    for batch in batches:
        with torch.inference_mode():
            expected = model(**batch).logits.numpy()
        (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})
        differences.append(abs(logits - expected).max())
    difference = torch.tensor(differences).max().item()
    if not difference <= TOLERANCE:  # nan is refused too
        (target / "model.onnx").unlink()
        raise SystemExit(f"The exported logits differ by up to {difference:.1e}, allowed is {TOLERANCE:g}: not kept.")
    model.config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return difference


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, export, and say what was written and how near it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default="outputs/merged", help="the classifier: %(default)s")
    parser.add_argument("--output", type=Path, help="the folder to write to: onnx, beside the classifier's")
    options = parser.parse_args(arguments)
    check_folder(options.folder)
    target, started = options.output or options.folder.parent / "onnx", time.monotonic()
    difference = export(options.folder, target)
    size, seconds = (target / "model.onnx").stat().st_size / 1e6, time.monotonic() - started
    print(f"{target / 'model.onnx'}: {size:.1f} MB, exported and checked in {seconds:.0f} s.")
    print(f"Its logits differ from the model's by at most {difference:.1e} (allowed: {TOLERANCE:g}).")


if __name__ == "__main__":
    main()
