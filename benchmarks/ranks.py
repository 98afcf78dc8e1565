"""How much does the rank matter, and which layers are adapted?

    python -m benchmarks.ranks --model small --dataset imdb20k

The notebook's section 11 over several seeds: short trainings on a part of the training split, scored on validation.
"""

import numpy as np

from benchmarks import common
from benchmarks.recipes import mean_and_interval


def measure(modules: str, rank: int, seed: int, config, task, tokenized, splits, train_rows: int) -> dict:
    """Train `modules` at a rank, briefly, and return the accuracy on the validation split, text by text as well."""
    nb = common.notebook()
    config = nb.with_rank(config.model_copy(update={"seed": seed}), rank)
    if modules == "all-linear":
        config = config.model_copy(update={"target_modules": [modules]})
    train = tokenized["train"].shuffle(seed=seed)
    train = train.select(range(min(train_rows, len(train))))
    model = nb.train_briefly(config, task.names, task.head, task.tokenizer, train)
    logits = nb.predict_logits(model, list(splits["validation"]["text"]), config, task.tokenizer)
    right = logits.argmax(-1) == np.array(splits["validation"]["label"])
    parameters = int(nb.storage(model).loc["all", "trained"])  # the head's are among them
    return {"parameters": parameters, "accuracy": float(right.mean()), "right": common.pack(right)}


def main() -> None:
    made = common.parser("ranks", __doc__)
    made.add_argument("--model", default="small", help="random, base, small, a Hub id or a folder")
    made.add_argument(
        "--dataset", default="dipanjanS/imdb_sentiment_finetune_dataset20k", help="Hub id, file or folder"
    )
    made.add_argument("--preset", default="fast", help="of the notebook")
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 64])
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    made.add_argument("--rows", type=int, default=2000, help="texts to train on")
    arguments = made.parse_args()
    settings = {name: getattr(arguments, name) for name in ("preset", "ranks", "seeds", "rows", "tiny")}
    settings |= {"model": common.public(arguments.model), "dataset": common.public(arguments.dataset)}
    study = common.Study("ranks", arguments, settings)
    folder, nb = common.model_folder(arguments.model, arguments.tiny), common.notebook()
    config, task = common.settle(model_name=folder, preset=arguments.preset)
    splits = common.load_texts(arguments.dataset, config, arguments.tiny)
    tokenized = {name: nb.tokenize(split, task.tokenizer, config.max_length) for name, split in splits.items()}
    choices = [(modules, rank) for modules in ("query, value", "all-linear") for rank in arguments.ranks]
    summary = []
    for modules, rank in choices:
        rows = []
        for seed in arguments.seeds:
            key, given = {"modules": modules, "rank": rank, "seed": seed}, (config, task, tokenized, splits)
            rows.append(study.add(key, lambda k=key, g=given: measure(*k.values(), *g, arguments.rows)))
        mean, interval = mean_and_interval([common.unpack(row["right"]) for row in rows], shared=True)
        row = {"modules": modules, "rank": rank, "parameters": rows[0]["parameters"], "accuracy": mean}
        summary.append(row | {"accuracy_ci95": interval, "seeds": [each["accuracy"] for each in rows]})
        study.write(summary=summary)


if __name__ == "__main__":
    main()
