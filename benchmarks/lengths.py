"""How much of a batch is padding, and what do its shapes cost, by the step to which batches are padded?

    python -m benchmarks.lengths --model base --sentences reviews.csv --reviews imdb20k

Each is an epoch of training: `default` draws its batches at random, `fast` from texts of like length. The notebook pads
to a multiple of 64: each shape of batch is captured once, which takes time. Each row is one run.
"""

import gc
import time

from benchmarks import common

STEPS, PRESETS = (8, 32, 64, 128), {"default": "", "fast": "fast"}


def measure(train, length: int, preset: str, step: int, folder: str) -> dict:
    """Train for an epoch on the texts `train` with batches padded to a multiple of `step`.

    Return the share of padding, shapes of batch, texts per second (captures included), the share of captured steps,
    and MB: the peak, and what the graphs hold (None without a GPU).
    """
    nb = common.notebook()
    config, task = common.settle(model_name=folder, max_length=length, preset=preset, num_train_epochs=1)
    held = nb.free_memory()
    texts = nb.tokenize(train, task.tokenizer, config.max_length)
    training = nb.brief_arguments(config, config.output_dir)
    model = nb.build_qlora(config, task.names, task.head)
    trainer = nb.make_trainer(model, config, training, task.tokenizer, texts)
    trainer.remove_callback(nb.PrinterCallback)
    trainer.data_collator.pad_to_multiple_of = step
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    filled, size = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    row = {"padding": 1 - filled / size, "shapes": len({mask.shape for mask in masks})}
    cuda = nb.torch.cuda if nb.torch.cuda.is_available() else None
    start = time.perf_counter()
    trainer.train()
    row["samples_per_second"] = len(texts) / (time.perf_counter() - start)
    row["captured"], reserved = common.notebook().captured_share(trainer), []
    row["peak_mb"] = cuda and (cuda.max_memory_allocated() - held) / 1e6
    for _ in range(2):  # with the graphs, and without
        gc.collect(), cuda and cuda.empty_cache()
        reserved.append(cuda.memory_reserved() / 1e6 if cuda else 0)
        common.drop_graphs(trainer)
    return row | {"graphs_mb": cuda and reserved[0] - reserved[1]}


def main() -> None:
    made = common.parser("lengths", __doc__)
    made.add_argument("--model", default="base", help="random, base, small, a Hub id or a folder")
    made.add_argument("--sentences", default="cornell-movie-review-data/rotten_tomatoes", help="Hub id, file or folder")
    made.add_argument(
        "--reviews", default="dipanjanS/imdb_sentiment_finetune_dataset20k", help="Hub id, file or folder"
    )
    made.add_argument("--rows", type=int, default=4000, help="texts of the epoch")
    made.add_argument("--steps", type=int, nargs="+", default=STEPS, help="batches are padded to a multiple of these")
    arguments = made.parse_args()
    settings = {name: getattr(arguments, name) for name in ("rows", "steps", "tiny")}
    settings |= {name: common.public(getattr(arguments, name)) for name in ("model", "sentences", "reviews")}
    study, folder = common.Study("lengths", arguments, settings), common.model_folder(arguments.model, arguments.tiny)
    texts = {"sentences": (arguments.sentences, 64), "reviews": (arguments.reviews, 256)}
    texts |= {"reviews, 512 tokens": (arguments.reviews, 512)}
    for name, (dataset, length) in texts.items():
        train = common.load_texts(dataset, common.notebook().Config(), arguments.tiny)["train"]
        train = train.select(range(min(arguments.rows, len(train))))
        for preset, fields in PRESETS.items():
            for step in arguments.steps:
                key, given = {"texts": name, "preset": preset, "step": step}, (train, length, fields, step, folder)
                study.add(key, lambda g=given: measure(*g))


if __name__ == "__main__":
    main()
