"""How accurate are the recipes? Each trains with three seeds; a seed draws the split.

    python -m benchmarks.accuracy --recipes search    learning rates, on validation
    python -m benchmarks.accuracy                     the rows of the report

All choices are made on validation, before the further reviews are read:
- Full fine-tuning takes the best rate of its search on seed 1.
- The preset `recommended` keeps its rate unless another is better than by chance.
- Batches of like length become the default if they cost less than 0.2 points, as the
  mean over the seeds. (These two are choices of the project, made by hand.)
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from benchmarks import common


@dataclass(frozen=True)
class Recipe:
    """A way to a classifier, and what it sets."""

    name: str
    method: str  # QLoRA, LoRA (on 16 bits), full, frozen, TF-IDF
    settings: dict


RECIPES = [
    Recipe("default", "QLoRA", {"train_sampling_strategy": "random"}),
    Recipe(
        "default-like-lengths",
        "QLoRA",
        {"train_sampling_strategy": "group_by_length"},
    ),
    Recipe("recommended", "QLoRA", {"preset": "recommended"}),
    Recipe("recommended-fast", "QLoRA", {"preset": "recommended,fast"}),
    Recipe("recommended-fast-16-bit", "LoRA", {"preset": "recommended,fast"}),
    Recipe("full-512", "full", common.full_settings(max_length=512)),
    Recipe("full-256", "full", common.full_settings(max_length=256)),
    Recipe("frozen-256", "frozen", {"max_length": 256}),
    Recipe("frozen-512", "frozen", {"max_length": 512}),
    Recipe("tfidf-logreg", "TF-IDF", {}),
    Recipe("tfidf-nb-svm", "TF-IDF", {}),
]
FULL_RATES = [1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4]
RECOMMENDED_RATES = [2e-4, 5e-4, 1e-3, 2e-3]


def searches():
    """Return the recipes of the searches, one for each rate."""
    recipes = []
    for rate in FULL_RATES:
        settings = common.full_settings(max_length=512, learning_rate=rate)
        recipes.append(Recipe(f"search-full-{rate:g}", "full", settings))
    for rate in RECOMMENDED_RATES:
        settings = {"preset": "recommended,fast", "learning_rate": rate}
        recipes.append(Recipe(f"search-recommended-{rate:g}", "QLoRA", settings))
    return recipes


def best_rate(study):
    """Return the learning rate of full fine-tuning with the best validation score."""
    scores = {}
    for rate in FULL_RATES:
        run = study.find({"recipe": f"search-full-{rate:g}"})
        if run is None:
            raise SystemExit("Search first: --recipes search.")
        scores[rate] = run["validation"]
    return max(scores, key=scores.get)


# ---- Training


def train(task, build, splits):
    """Train as the notebook does, on what `build` builds; return the Trainer."""
    nb = common.notebook()
    config = task.config
    train_tokens = nb.tokenize(splits["train"], task.tokenizer, config.max_length)
    validation_tokens = nb.tokenize(
        splits["validation"], task.tokenizer, config.max_length
    )
    nb.free_memory()
    model = build(config, task.names, task.head)
    arguments = nb.training_arguments(config, config.output_dir)
    arguments.disable_tqdm = True
    arguments.save_only_model = True
    stopping = nb.EarlyStopping(config.early_stopping_patience)
    trainer = nb.make_trainer(
        model,
        config,
        arguments,
        task.tokenizer,
        train_tokens,
        validation_tokens,
        callbacks=[nb.Clock(), stopping],
    )
    trainer.remove_callback(nb.PrinterCallback)
    trainer.train()
    return trainer


def describe_training(trainer):
    """Return what a training came to and what it cost."""
    summary = common.notebook().training_summary(trainer, len(trainer.train_dataset))
    return {
        "validation": trainer.state.best_metric,
        "best_epoch": summary["best_epoch"],
        "learning_rate": trainer.args.learning_rate,
        "seconds": summary["seconds"],
        "samples_per_second": summary["samples_per_second"],
        "peak_mb": summary["peak_mb"],
        "captured_share": summary["captured_share"],
    }


def unwrapped(trainer):
    """Return the trained model without what the Trainer put around it."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


# ---- Answers to texts: arrays of class numbers


def answers_of_adapter(task, folder, texts):
    """Load an adapter onto a fresh 4-bit base, and ask it."""
    nb = common.notebook()
    model = nb.load_adapter(folder, task.config, task.names, task.head)
    logits = nb.predict_logits(model, texts, task.config, task.tokenizer)
    return logits.argmax(axis=-1)


def answers_of_saved_model(task, model, texts):
    """Save a plain model, and ask it by `pipeline` in a fresh process."""
    folder = Path(task.config.output_dir, "model")
    model.save_pretrained(folder)
    task.tokenizer.model_max_length = task.config.max_length
    task.tokenizer.save_pretrained(folder)
    probabilities = common.notebook().classify_apart(folder, texts)
    shutil.rmtree(folder)
    return probabilities.argmax(axis=-1)


def fit_frozen(task, train_texts, train_labels):
    """Fit the notebook's second baseline; return what maps texts to answers."""
    nb = common.notebook()
    base = nb.load_base(task.config, task.names, task.head)

    def states_of(texts):
        return nb.mean_states(base, texts, task.config, task.tokenizer)

    regression = nb.logistic_regression(0.01, "none")
    classifier = make_pipeline(StandardScaler(), regression)
    classifier.fit(states_of(train_texts), train_labels)
    return lambda texts: classifier.predict(states_of(texts))


class LogCountRatio:
    """Weigh each feature by the log of the ratio of its shares in the two classes.

    `alpha` is added to all counts (Wang and Manning, "Baselines and Bigrams", 2012).
    """

    def __init__(self, alpha):
        self.alpha = alpha

    def fit(self, X, y):
        labels = np.asarray(y)
        negative = self.alpha + np.asarray(X[labels == 0].sum(axis=0)).ravel()
        positive = self.alpha + np.asarray(X[labels == 1].sum(axis=0)).ravel()
        self.ratio = np.log(positive / positive.sum())
        self.ratio -= np.log(negative / negative.sum())
        return self

    def transform(self, X):
        return X.multiply(self.ratio).tocsr()


def fit_nb_svm(train, seed):
    """Fit words to trigrams with naive Bayes weights, and a linear SVM."""
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 3),
        sublinear_tf=True,
        min_df=2,
        token_pattern=r"\b\w+\b|[!?]",
    )
    svm = LinearSVC(C=3, random_state=seed)
    model = make_pipeline(vectorizer, LogCountRatio(alpha=0.05), svm)
    return model.fit(train["text"], train["label"])


# ---- Runs


def further_reviews(further, tiny):
    """Return texts that no choice has seen, and the names of their labels."""
    rows = common.read_rows(further, tiny)
    return list(rows["text"]), list(rows["label"])


LENGTHS = [128, 256, 512]  # tokens


def shares_by_length(task, texts, is_right):
    """Return how many texts there are, and the share right, by their length."""
    uncut = task.tokenizer(texts, verbose=False)["input_ids"]
    groups = np.digitize([len(ids) for ids in uncut], LENGTHS, right=True)
    shares = []
    for group in range(len(LENGTHS) + 1):
        inside = is_right[groups == group]
        share = float(inside.mean()) if len(inside) else None
        shares.append({"texts": len(inside), "share": share})
    return shares


def run_search(recipe, splits, model_name):
    """Train on the split of seed 1; return the validation score and the costs."""
    settings = {"seed": 1}
    settings.update(recipe.settings)
    task = common.settle(model_name, settings)
    build = common.build_full if recipe.method == "full" else common.build_qlora
    return describe_training(train(task, build, splits))


def run(recipe, seed, rate, splits, further, model_name):
    """Train a recipe, and return its costs and which answers are right.

    `shipped` is what a user takes away: the merged model, by `pipeline`.
    """
    nb = common.notebook()
    settings = {"seed": seed}
    settings.update(recipe.settings)
    if rate:
        settings["learning_rate"] = rate
    task = common.settle(model_name, settings)
    further_texts, further_names = further
    texts = list(splits["test"]["text"]) + further_texts
    class_names = splits["test"].features["label"].names
    further_labels = [class_names.index(name) for name in further_names]
    labels = np.array(list(splits["test"]["label"]) + further_labels)
    row = {}
    answers = {}
    if recipe.method == "QLoRA":
        trainer = train(task, common.build_qlora, splits)
        row = describe_training(trainer)
        folder = tempfile.mkdtemp(dir=task.config.output_dir)
        nb.save_adapter(unwrapped(trainer), folder)
        del trainer
        nb.free_memory()
        answers["adapter"] = answers_of_adapter(task, folder, texts)
        merged = nb.merge_adapter(folder, task.config, task.names, task.head)
        answers["shipped"] = answers_of_saved_model(task, merged, texts)
    elif recipe.method == "LoRA":
        trainer = train(task, common.build_lora, splits)
        row = describe_training(trainer)
        merged = unwrapped(trainer).float().merge_and_unload()
        answers["shipped"] = answers_of_saved_model(task, merged, texts)
    elif recipe.method == "full":
        trainer = train(task, common.build_full, splits)
        row = describe_training(trainer)
        answers["shipped"] = answers_of_saved_model(task, unwrapped(trainer), texts)
    elif recipe.method == "frozen":
        train_texts = list(splits["train"]["text"])
        answer = fit_frozen(task, train_texts, splits["train"]["label"])
        answers["shipped"] = answer(texts)
    elif recipe.name == "tfidf-logreg":
        answers["shipped"] = nb.fit_tfidf(splits["train"]).predict(texts)
    else:
        answers["shipped"] = fit_nb_svm(splits["train"], seed).predict(texts)
    n_test = len(splits["test"])
    for name, answer in answers.items():
        is_right = answer == labels
        row[f"{name}_test"] = common.pack(is_right[:n_test])
        row[f"{name}_further"] = common.pack(is_right[n_test:])
    is_right = answers["shipped"] == labels
    row["by_length"] = shares_by_length(task, further_texts, is_right[n_test:])
    return row


def main():
    made = common.parser("accuracy", __doc__)
    made.add_argument("--model", default="base", help="base, a Hub id or a folder")
    made.add_argument("--dataset", default="imdb20k", help="Hub id, file or folder")
    made.add_argument("--further", default="imdb_test10k", help="further reviews")
    names = [recipe.name for recipe in RECIPES]
    made.add_argument("--recipes", nargs="+", default=names, help="search, or names")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = made.parse_args()
    tiny = arguments.tiny
    settings = {
        "model": common.notebook().public_name(arguments.model),
        "dataset": common.notebook().public_name(arguments.dataset),
        "further": common.notebook().public_name(arguments.further),
        "tiny": tiny,
    }
    study = common.Study("accuracy", arguments.out, settings)
    folder = common.model_folder(arguments.model, tiny)
    for recipe in searches():
        if "search" in arguments.recipes or recipe.name in arguments.recipes:
            splits = common.read_splits(arguments.dataset, 1, tiny)
            key = {"recipe": recipe.name, "seed": 1}
            study.add(key, run_search, recipe, splits, folder)
    chosen = [recipe for recipe in RECIPES if recipe.name in arguments.recipes]
    if not chosen:
        return  # a search alone: the further reviews stay unread
    rate_of = {}
    if any(recipe.method == "full" for recipe in chosen):
        rate_of["full"] = best_rate(study)  # fail now, if ever
    further = further_reviews(arguments.further, tiny)
    for seed in arguments.seeds:
        splits = common.read_splits(arguments.dataset, seed, tiny)
        for recipe in chosen:
            rate = rate_of.get(recipe.method)
            key = {"recipe": recipe.name, "seed": seed}
            study.add(key, run, recipe, seed, rate, splits, further, folder)


if __name__ == "__main__":
    main()
