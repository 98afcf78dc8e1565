"""How many labels do I need? Three ways to a classifier, on more and more reviews.

Each size is a part of the training split, drawn with its seed. QLoRA trains on eight
ninths of it, and the rest chooses its best epoch; the others are fitted on all of it.
All are scored on the whole test split.
"""

import numpy as np
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import accuracy, common

SIZES = [125, 250, 500, 1000, 2000, 4000, 8000, 16_000]
PRESET = "recommended,fast"


def draw(split, count, seed):
    """Return `count` texts of a split, with each class in its share."""
    if count >= len(split):
        return split
    parts = split.train_test_split(
        train_size=count, seed=seed, stratify_by_column="label"
    )
    return parts["train"]


def is_right(answers, split):
    """Return as packed bools which answers are right."""
    return common.pack(answers == np.array(split["label"]))


def run_tfidf(train, test):
    """Fit the notebook's first baseline, and score it."""
    model = common.notebook().fit_tfidf(train)
    return {"test": is_right(model.predict(test["text"]), test)}


def run_qlora(task, splits):
    """Train, with more epochs where there are few texts, as the notebook does."""
    nb = common.notebook()
    labels = splits["train"]["label"]
    config = nb.fit_to_data(task.config, {}, labels)
    task = common.Task(config, task.names, task.head, task.tokenizer)
    trainer = accuracy.train(task, common.build_qlora, splits)
    row = accuracy.describe_training(trainer)
    row["epochs"] = config.num_train_epochs
    row["validation_texts"] = len(splits["validation"])
    texts = list(splits["test"]["text"])
    logits = nb.predict_logits(trainer.model, texts, config, task.tokenizer)
    row["test"] = is_right(logits.argmax(axis=-1), splits["test"])
    return row


class FrozenStates:
    """The frozen base's mean states of all training and test texts, made once."""

    def __init__(self, task, splits):
        self.task = task
        self.splits = splits
        self.states = None

    def compute(self):
        """Run the base on all texts."""
        nb = common.notebook()
        task = self.task
        base = nb.load_base(task.config, task.names, task.head)
        self.states = {}
        for name in ("train", "test"):
            texts = list(self.splits[name]["text"])
            states = nb.mean_states(base, texts, task.config, task.tokenizer)
            self.states[name] = states

    def run(self, places):
        """Fit on some of the training texts, and score on all test texts."""
        if self.states is None:
            self.compute()
        regression = common.notebook().logistic_regression(0.01, "none")
        model = make_pipeline(StandardScaler(), regression)
        labels = np.array(self.splits["train"]["label"])
        model.fit(self.states["train"][places], labels[places])
        answers = model.predict(self.states["test"])
        return {"test": is_right(answers, self.splits["test"])}


def run_seed(study, seed, sizes, dataset, model_name, tiny):
    """Run all sizes with one seed."""
    task = common.settle(model_name, {"preset": PRESET, "seed": seed})
    splits = common.read_splits(dataset, seed, tiny)
    train = splits["train"].add_column("place", list(range(len(splits["train"]))))
    frozen = FrozenStates(task, splits)
    for size in sizes:
        size = min(size, len(train))
        subset = draw(train, size, seed)
        places = subset["place"]
        subset = subset.remove_columns("place")
        cut = subset.train_test_split(
            test_size=1 / 9, seed=seed, stratify_by_column="label"
        )
        parts = {
            "train": cut["train"],
            "validation": cut["test"],
            "test": splits["test"],
        }
        key = {"texts": size, "seed": seed, "method": "TF-IDF"}
        study.add(key, run_tfidf, subset, splits["test"])
        key = {"texts": size, "seed": seed, "method": "frozen base"}
        study.add(key, frozen.run, places)
        key = {"texts": size, "seed": seed, "method": "QLoRA"}
        study.add(key, run_qlora, task, parts)


def main():
    made = common.parser("labels", __doc__)
    made.add_argument("--model", default="base", help="base, a Hub id or a folder")
    made.add_argument("--dataset", default="imdb20k", help="Hub id, file or folder")
    made.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="texts")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = made.parse_args()
    settings = {
        "model": common.notebook().public_name(arguments.model),
        "dataset": common.notebook().public_name(arguments.dataset),
        "preset": PRESET,
        "tiny": arguments.tiny,
    }
    study = common.Study("labels", arguments.out, settings)
    folder = common.model_folder(arguments.model, arguments.tiny)
    for seed in arguments.seeds:
        run_seed(
            study, seed, arguments.sizes, arguments.dataset, folder, arguments.tiny
        )


if __name__ == "__main__":
    main()
