"""Classify the rows of a file with a trained classifier; nothing is trained.

The rows are written to a CSV file as they are (without blanks that begin a cell), plus
three columns: `label`, `confidence` and `reliable` (`predicted_label`, ... where the
file has such columns). A row without a text gets none. Section 12 of the notebook does
the same (`predict_name`).
"""

import argparse
import logging
import os
from pathlib import Path

from export_onnx import check_folder
from notebook_api import import_definitions, read_environment


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, and classify."""
    read_environment()
    output_dir = Path(os.environ.get("QLORA_OUTPUT_DIR") or "outputs").expanduser()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="CSV, TSV, JSON or Parquet, or a folder of them")
    parser.add_argument(
        "--model",
        type=Path,
        default=output_dir / "merged",
        help="the classifier's folder: %(default)s",
    )
    parser.add_argument(
        "--output", type=Path, help="default: predictions.csv, beside that folder"
    )
    parser.add_argument(
        "--text-column",
        default="",
        help="the column of the texts, if it is not text or review; default:"
        " QLORA_TEXT_COLUMN, if the file has that column",
    )
    options = parser.parse_args(arguments)
    text_column = options.text_column or os.environ.get("QLORA_TEXT_COLUMN", "")
    check_folder(options.model)
    if not Path(options.file).exists():
        raise SystemExit(f"{options.file}: there is no such file or folder.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns when imported
    path = options.output or options.model.parent / "predictions.csv"
    source = Path(options.file).resolve()
    if path.is_dir() or source in [path.resolve(), *path.resolve().parents]:
        raise SystemExit(f"--output {path} is a folder, or the input itself.")
    if path.suffix.lower() != ".csv":
        raise SystemExit(f"--output {path}: the name must end in .csv.")
    # imported here: the libraries take some seconds
    from transformers import pipeline
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    notebook = import_definitions()
    try:
        classify = pipeline("text-classification", model=str(options.model))
    except Exception as error:  # transformers and safetensors raise what they raise
        raise SystemExit(f"--model {options.model} cannot be used: {error}") from None
    classes = ", ".join(classify.model.config.label2id)
    print(f"The classifier in {options.model} knows the classes {classes}.")
    if len(classify.tokenizer) < classify.model.config.vocab_size / 2:
        raise SystemExit(f"--model {options.model} has no tokenizer of its model.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if options.text_column:
            for table in notebook.read_tables(options.file):
                notebook.find_column(table, "text_column", options.text_column, [])
        notebook.classify_file(options.file, path, classify, text_column)
    except Exception as error:
        raise SystemExit(
            f"{error}\n--text-column names the column of the texts, --model the"
            " classifier's folder, and --output the file to write."
        ) from None


if __name__ == "__main__":
    main()
