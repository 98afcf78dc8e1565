"""What does each component of QLoRA save, how does the peak grow, and what is the largest batch that fits?

    python -m benchmarks.memory --model random

All with captured steps, as users run them (on a GPU). Peaks are those of PyTorch's allocator, in MB (10^6 bytes); what
CUDA holds beside it is measured too, and left free when the largest batch is sought.
"""

import functools

from benchmarks import common
from benchmarks.speed import FULL

PAIR, SMALL = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 1}
STEPS = {  # from full fine-tuning to the preset `lean`, one component after the other: base, adapters, settings
    "full fine-tuning, fp16": ("float32", False, FULL),
    "adapters instead of all weights": ("float32", True, FULL),
    "4-bit matrices": ("4-bit", True, FULL),
    "gradient checkpointing": ("4-bit", True, FULL | {"gradient_checkpointing": True}),
    "paged 8-bit AdamW: the default": ("4-bit", True, {}),
    "frozen tensors in 16 bits: lean": ("4-bit", True, {"preset": "lean"}),
}
METHODS = {
    "full fine-tuning": ("float32", False, FULL),
    "QLoRA default": ("4-bit", True, {}),
    "QLoRA fast": ("4-bit", True, {"preset": "fast"}),
    "QLoRA lean": ("4-bit", True, {"preset": "lean"}),
}


def measure(method: tuple, folder: str, batch: dict, length: int, steps: int) -> dict:
    """Return the notebook's figures of a method (base, adapters, settings) on texts of `length` tokens."""
    base, adapters, settings = method
    settings = {"model_name": folder, "max_length": length, "efficiency_steps": steps} | settings | batch
    config, task = common.settle(**settings)
    texts = common.random_texts(config.per_device_train_batch_size * config.gradient_accumulation_steps, length)
    build = functools.partial(common.build, base, adapters)
    row = common.notebook().measure_method("", build, config, task.names, task.head, task.tokenizer, texts)
    del row["method"]  # the study has names of its own
    return row


def largest_batch(method: tuple, folder: str, length: int, room_mb: float, growth: list[dict]) -> dict:
    """Find the largest micro-batch, in steps of 8 texts, whose peak stays within `room_mb`.

    `growth` (peaks by batch) says where to begin: the peak is nearly linear in the batch.
    """
    (x0, y0), (x1, y1) = [(row["batch"], row["peak_mb"]) for row in growth[-2:]]
    batch, peaks = max(8, int((x0 + (room_mb - y0) * (x1 - x0) / (y1 - y0)) // 8 * 8)), {}
    while batch not in peaks and batch > 0:
        row = measure(method, folder, {"per_device_train_batch_size": batch} | SMALL, length, 2)
        peaks[batch] = row["peak_mb"]
        batch += 8 if (row["peak_mb"] or room_mb + 1) <= room_mb else -8  # None: it did not fit this GPU either
    fits = [size for size, peak in peaks.items() if peak and peak <= room_mb]
    return {"batch": max(fits, default=0), "peaks": peaks}


def savings(rows: list[dict]) -> list[dict]:
    """Return the peak after each component, and what it saved in MB; None where it was not measured."""
    peaks = [row["peak_mb"] for row in rows]
    saved = [None, *(a - b if a and b else None for a, b in zip(peaks, peaks[1:]))]
    return [{"component": row["component"], "peak_mb": row["peak_mb"], "saved_mb": s} for row, s in zip(rows, saved)]


def main() -> None:
    made = common.parser("memory", __doc__)
    made.add_argument("--model", default="random", help="random, base, small, a Hub id or a folder")
    made.add_argument("--length", type=int, default=256, help="tokens of a text, where the length does not vary")
    made.add_argument("--steps", type=int, default=10, help="timed steps a point")
    made.add_argument("--lengths", type=int, nargs="*", default=[64, 128, 256, 512])
    made.add_argument("--batches", type=int, nargs="*", default=[8, 16, 32, 64])
    made.add_argument("--caps", type=float, nargs="*", default=[4, 8, 16], help="memory of a GPU in GB")
    arguments = made.parse_args()
    names = ("length", "steps", "lengths", "batches", "caps", "tiny")
    settings = {name: getattr(arguments, name) for name in names} | {"model": common.public(arguments.model)}
    study = common.Study("memory", arguments, settings)
    folder, torch = common.model_folder(arguments.model, arguments.tiny), common.notebook().torch
    first = next(iter(METHODS.values()))
    measure(first, folder, PAIR, arguments.length, 1)  # the first model on a GPU is slow
    if torch.cuda.is_available():  # what CUDA and its libraries hold beside the allocator
        free, total = torch.cuda.mem_get_info()
        study.write(outside_the_allocator_mb=(total - free - torch.cuda.memory_reserved()) / 1e6)
    components = []
    for name, method in STEPS.items():
        key = {"component": name}
        measured = study.add(key, lambda m=method: measure(m, folder, PAIR, arguments.length, arguments.steps))
        components.append(measured)
    study.write(components=savings(components))
    for name, method in METHODS.items():
        points = [(batch, arguments.length) for batch in arguments.batches]
        points += [(16, length) for length in arguments.lengths if length != arguments.length]
        for batch, length in points:
            size = {"per_device_train_batch_size": batch} | SMALL
            key = {"growth": name, "batch": batch, "length": length}
            study.add(key, lambda m=method, s=size, n=length: measure(m, folder, s, n, arguments.steps))
    for name, method in METHODS.items() if torch.cuda.is_available() else ():
        growth = [r for r in study.runs if r.get("growth") == name and r["length"] == arguments.length]
        for cap in arguments.caps:
            room = cap * 1e3 - study.results["outside_the_allocator_mb"]
            key = {"largest_batch": name, "gpu_gb": cap}
            study.add(key, lambda m=method, g=growth, r=room: largest_batch(m, folder, arguments.length, r, g))


if __name__ == "__main__":
    main()
