"""How fast is a training step, every method treated alike?

    python -m benchmarks.speed --model random
    python -m benchmarks.speed --model base --dataset imdb20k

Each method trains on texts of the full length, in turn with the others, for some
rounds. `eager` launches every kernel from Python, `captured` replays CUDA graphs,
`compiled` is torch.compile(mode="reduce-overhead"). With a data set, an epoch of its
texts is timed as well: batches at random, and of like length.
"""

import functools
import time
from dataclasses import dataclass

import torch

from benchmarks import common


@dataclass(frozen=True)
class Method:
    """A way to train, and what it sets."""

    name: str
    build: object
    settings: dict
    compiled: bool = False


def full(name, batch, accumulation, checkpointing, graphs):
    """Return full fine-tuning in fp16, as a method."""
    settings = common.full_settings(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        cuda_graphs=graphs,
    )
    return Method(name, common.build_full, settings)


def qlora(name, preset, graphs):
    """Return QLoRA with a preset, as a method."""
    settings = {"preset": preset, "cuda_graphs": graphs}
    return Method(name, common.build_qlora, settings)


def lora(name, preset):
    """Return LoRA on a 16-bit base with the settings of a preset, captured."""
    return Method(name, common.build_lora, {"preset": preset})


METHODS = [
    full("full, eager, 16 x 2", 16, 2, False, False),
    full("full, eager, 32 x 1", 32, 1, False, False),
    full("full, captured, 32 x 1", 32, 1, False, True),
    full("full, captured, 16 x 2, checkpointed", 16, 2, True, True),
    lora("LoRA 16-bit, captured, as fast", "fast"),
    lora("LoRA 16-bit, captured, as lean", "lean"),
    qlora("QLoRA default, eager", "", False),
    qlora("QLoRA default, captured", "", True),
    Method(
        "QLoRA default, captured, class weights",
        common.build_qlora,
        {"class_weights": "balanced"},
    ),
    qlora("QLoRA fast, eager", "fast", False),
    qlora("QLoRA fast, captured", "fast", True),
    qlora("QLoRA lean, eager", "lean", False),
    qlora("QLoRA lean, captured", "lean", True),
]
COMPILED = [
    Method(
        "full, compiled, 32 x 1",
        common.build_full,
        common.full_settings(cuda_graphs=False),
        compiled=True,
    ),
    Method(
        "QLoRA fast, compiled",
        common.build_qlora,
        {"preset": "fast", "cuda_graphs": False},
        compiled=True,
    ),
]


def compile_forward(model):
    """Let torch.compile capture the model's passes, each call a step of its own."""
    compiled_forward = torch.compile(model.forward, mode="reduce-overhead")

    @functools.wraps(model.forward)  # Trainer drops columns that it does not name
    def forward(*args, **kwargs):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled_forward(*args, **kwargs)

    model.forward = forward
    return model


def measure(method, folder, length, steps):
    """Return speed, peak and weights, as the notebook's section 10 measures them.

    The speed is None, and `error` says why, where the method fails.
    """
    nb = common.notebook()
    settings = {"max_length": length, "efficiency_steps": steps}
    settings.update(method.settings)
    task = common.settle(folder, settings)

    def build(*arguments):
        model = method.build(*arguments)
        if method.compiled:
            compile_forward(model)
        return model

    started = time.perf_counter()
    try:
        row = nb.measure_method(
            method.name,
            build,
            task.config,
            task.names,
            task.head,
            task.tokenizer,
            common.random_texts(32, length),
        )
    except Exception as error:  # torch.compile raises what it raises
        reason = str(error).splitlines()[0]
        return {"samples_per_second": None, "error": f"{reason:.200}"}
    if row["measured"]:
        timed = steps * 32 / row["samples_per_second"]
        row["seconds_before"] = time.perf_counter() - started - timed
    return row


def measure_epoch(sampling, folder, texts):
    """Train the default for an epoch on reviews; return its speed and its padding.

    Captures are a part of the time.
    """
    nb = common.notebook()
    settings = {"train_sampling_strategy": sampling, "num_train_epochs": 1}
    task = common.settle(folder, settings)
    tokens = nb.tokenize(texts, task.tokenizer, task.config.max_length)
    nb.free_memory()
    trainer = nb.make_trainer(
        nb.build_qlora(task.config, task.names, task.head),
        task.config,
        nb.brief_arguments(task.config, task.config.output_dir),
        task.tokenizer,
        tokens,
    )
    trainer.remove_callback(nb.PrinterCallback)
    n_tokens = 0
    n_places = 0
    for batch in trainer.get_train_dataloader():
        n_tokens += int(batch["attention_mask"].sum())
        n_places += batch["attention_mask"].numel()
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    return {
        "samples_per_second": len(texts) / seconds,
        "padding": 1 - n_tokens / n_places,
        "captured_share": nb.captured_share(trainer),
    }


def main():
    made = common.parser("speed", __doc__)
    made.add_argument("--model", default="random", help="random, base, id or folder")
    made.add_argument("--dataset", default="", help="Hub id, file or folder")
    made.add_argument("--length", type=int, default=256, help="tokens of a text")
    made.add_argument("--steps", type=int, default=40, help="timed steps of 32 texts")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--rows", type=int, default=8000, help="reviews of an epoch")
    made.add_argument("--methods", default="", help="those with this in their names")
    made.add_argument("--compiled", action="store_true", help="torch.compile, too")
    arguments = made.parse_args()
    model = common.notebook().public_name(arguments.model)
    settings = {
        "length": arguments.length,
        "steps": arguments.steps,
        "tiny": arguments.tiny,
    }
    study = common.Study("speed", arguments.out, settings)
    folder = common.model_folder(arguments.model, arguments.tiny)
    length = arguments.length
    methods = [method for method in METHODS if arguments.methods in method.name]
    if not methods:
        made.error(f"no method has {arguments.methods!r} in its name")
    measure(methods[0], folder, length, 1)  # the first model on a GPU is slow
    for number in range(arguments.rounds):
        for method in methods:
            key = {"model": model, "method": method.name, "round": number}
            study.add(key, measure, method, folder, length, arguments.steps)
    if arguments.dataset:
        splits = common.read_splits(arguments.dataset, 1, arguments.tiny)
        rows = min(arguments.rows, len(splits["train"]))
        texts = splits["train"].select(range(rows))
        for number in range(arguments.rounds):
            for sampling in ("random", "group_by_length"):
                key = {
                    "model": model,
                    "dataset": common.notebook().public_name(arguments.dataset),
                    "rows": rows,
                    "epoch": sampling,
                    "round": number,
                }
                study.add(key, measure_epoch, sampling, folder, texts)
    if arguments.compiled:
        for method in COMPILED:
            key = {"model": model, "method": method.name, "round": 0}
            study.add(key, measure, method, folder, length, arguments.steps)


if __name__ == "__main__":
    main()
