"""How accurate are the recipes? Each trains on several seeds, and a seed draws the split as well.

    python -m benchmarks.recipes --model base --dataset imdb20k --recipes search     learning rates, on validation only
    python -m benchmarks.recipes --model base --dataset imdb20k                      the rows of the report
    python -m benchmarks.recipes --model base --dataset imdb20k --final imdb_test10k once, at the very end

The trained models are kept below `--out`, so that `--final` scores them on texts that no choice has seen.
"""

import functools
import time

import numpy as np

from benchmarks import common
from benchmarks.speed import FULL, WHOLE

FULL_BEST = FULL | WHOLE | {"learning_rate": 5e-5, "max_length": 512}  # it reads as much as `recommended`
FAST, BOTH = {"preset": "fast"}, {"preset": "recommended,fast"}
RECIPES = {  # base, adapters, settings
    "default": ("4-bit", True, {}),
    "recommended": ("4-bit", True, {"preset": "recommended"}),
    "full_finetuning": ("float32", False, FULL_BEST),
    "tfidf_logreg": None,
    "tfidf_nb_svm": None,
    "default, eager": ("4-bit", True, {"cuda_graphs": False}),
    "lean": ("4-bit", True, {"preset": "lean"}),
    "fast": ("4-bit", True, FAST),  # from here on one change at a time to `recommended`
    "fast, rate 5e-4": ("4-bit", True, FAST | {"learning_rate": 5e-4}),
    "fast, rate 5e-4, 512 tokens": ("4-bit", True, FAST | {"learning_rate": 5e-4, "max_length": 512}),
    "recommended, paged 8-bit AdamW": ("4-bit", True, {"preset": "recommended", "optim": "paged_adamw_8bit"}),
    "recommended, fast": ("4-bit", True, BOTH),  # and from here on one change to it
    "recommended, fast, paged 8-bit AdamW": ("4-bit", True, BOTH | {"optim": "paged_adamw_8bit"}),
    "recommended, fast, 16-bit base": ("float16", True, BOTH),
    "recommended, fast, dropout 0": ("4-bit", True, BOTH | {"lora_dropout": 0.0}),
    "recommended, fast, rank 4": ("4-bit", True, BOTH | {"lora_r": 4, "lora_alpha": 8}),
    "recommended, fast, 5 epochs": ("4-bit", True, BOTH | {"num_train_epochs": 5.0}),
    "recommended, fast, 256 tokens": ("4-bit", True, BOTH | {"max_length": 256}),
}
PUBLISHED = {"validation_share": 0.1, "test_share": 0.5}  # 8,000 of 20,000 to train on, as the data set was published
RECIPES |= {
    f"{name}, published shares": (*RECIPES[name][:2], RECIPES[name][2] | PUBLISHED)
    for name in ("default", "recommended", "full_finetuning")
} | {"tfidf_nb_svm, published shares": None}
MERGED = ("default", "recommended", "lean", "fast")  # scored merged, too, on the final texts
SEARCH = {
    f"search full {rate:g}": ("float32", False, FULL_BEST | {"learning_rate": rate}) for rate in (2e-5, 3e-5, 5e-5)
}
SEARCH |= {
    f"search recommended {rate:g}": ("4-bit", True, BOTH | {"learning_rate": rate}) for rate in (2e-4, 5e-4, 1e-3)
}


class LogCountRatio:
    """Weigh each feature by the log of how much larger its share is in class 1 than in class 0, `alpha` added to both
    counts (Wang and Manning, "Baselines and Bigrams", ACL 2012)."""

    def __init__(self, alpha: float):
        self.alpha = alpha

    def fit(self, X, y):
        shares = [self.alpha + np.asarray(X[np.asarray(y) == label].sum(0)).ravel() for label in (0, 1)]
        self.ratio = np.log(shares[1] / shares[1].sum()) - np.log(shares[0] / shares[0].sum())
        return self

    def transform(self, X):
        return X.multiply(self.ratio).tocsr()


def fit_baseline(name: str, train, seed: int):
    """Fit a TF-IDF baseline: the notebook's, or the stronger one of words up to trigrams with naive Bayes weights."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    if name == "tfidf_logreg":
        return common.notebook().fit_tfidf(train)
    rare = 2 if len(train) >= 500 else 1
    words = TfidfVectorizer(ngram_range=(1, 3), sublinear_tf=True, min_df=rare, token_pattern=r"\b\w+\b|[!?]")
    model = make_pipeline(words, LogCountRatio(alpha=0.05), LinearSVC(C=3, random_state=seed))
    return model.fit(train["text"], train["label"])


def mean_and_interval(values: list, shared: bool, resamples: int = 2000) -> tuple[float, list[float]]:
    """Return the mean over seeds of `values` (an array of numbers of reviews for each), and its 95% interval.

    Seeds and reviews are drawn with replacement: reviews once for all seeds where these answered the same ones
    (`shared`: Owen, The pigeonhole bootstrap, Annals of Applied Statistics, 2007), or else anew for each. Three seeds
    are few: the interval is, if anything, too narrow.
    """
    rng, seeds = np.random.default_rng(0), len(values)
    if shared:
        matrix, n = np.stack(values).astype(float), len(values[0])
        drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) @ matrix
        means = (drawn * rng.multinomial(n, np.full(n, 1 / n), resamples)).sum(1) / matrix.size
    else:
        means = np.zeros(resamples)
        for chosen in rng.integers(0, seeds, (seeds, resamples)):
            for seed, one in enumerate(values):
                kinds, counts = np.unique(one.astype(float), return_counts=True)
                draws = rng.multinomial(len(one), counts / len(one), resamples) @ kinds / len(one)
                means += np.where(chosen == seed, draws, 0) / seeds
    mean = float(np.mean([one.mean() for one in values]))
    return mean, [float(end) for end in np.percentile(means, [2.5, 97.5])]


@functools.lru_cache(3)
def data(dataset: str, seed: int, tiny: bool, published: bool = False):
    """Return the splits of a seed: the same for all recipes of like shares."""
    config = common.notebook().Config(seed=seed, **(PUBLISHED if published else {}))
    return common.load_texts(dataset, config, tiny)


def answer(name: str, model, task, config, split) -> np.ndarray:
    """Return which texts of a split the model answers right, as bools."""
    if name.startswith("tfidf"):
        return model.predict(split["text"]) == np.array(split["label"])
    nb, base = common.notebook(), (RECIPES | SEARCH)[name][0]
    with nb.torch.autocast(model.device.type, nb.torch.float16, enabled=common.base_here(base) == "float16"):
        logits = nb.predict_logits(model, list(split["text"]), config, task.tokenizer)
    return logits.argmax(-1) == np.array(split["label"])


def train(name: str, seed: int, folder: str, arguments) -> dict:
    """Train a recipe and score it on validation and, unless it is a search, on test."""
    nb, recipe = common.notebook(), (RECIPES | SEARCH)[name]
    torch, start, row = nb.torch, time.perf_counter(), {}
    base, adapters, settings = recipe or ("", False, {})
    config, task = common.settle(model_name=folder, seed=seed, **settings)
    splits = data(arguments.dataset, seed, arguments.tiny, "published" in name)
    if recipe is None:
        model = fit_baseline(name, splits["train"], seed)
    else:
        tokens = {each: nb.tokenize(split, task.tokenizer, config.max_length) for each, split in splits.items()}
        held = nb.free_memory()
        model = common.build(base, adapters, config, task.names, task.head)
        trainer_arguments = nb.training_arguments(config, config.output_dir)
        trainer_arguments.save_only_model = True
        trainer_arguments.disable_tqdm = True
        stopping = nb.EarlyStoppingCallback(config.early_stopping_patience)
        parts = (tokens["train"], tokens["validation"])
        trainer = nb.make_trainer(model, config, trainer_arguments, task.tokenizer, *parts, callbacks=[stopping])
        start = time.perf_counter()
        trainer.train()
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6 if torch.cuda.is_available() else None
        row["captured"] = common.notebook().captured_share(trainer)
        common.drop_graphs(trainer)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        model.save_pretrained(kept(arguments, name, seed))
    row["seconds"] = time.perf_counter() - start
    for split in ("validation",) if name in SEARCH else ("validation", "test"):
        right = answer(name, model, task, config, splits[split])
        row |= {split: float(right.mean()), f"{split}_right": common.pack(right)}
    return row


def kept(arguments, name: str, seed: int):
    """Return the folder of a trained model."""
    return arguments.out / "models" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


@functools.lru_cache(1)
def final_texts(dataset: str, final: str, tiny: bool) -> dict:
    """Return the texts of `--final` and the numbers of their labels."""
    nb, splits = common.notebook(), data(dataset, 1, tiny)
    if tiny:
        return splits["test"][:]
    rows, _ = nb.clean(nb.pick_columns(nb.read_tables(final)))
    names = splits["train"].features["label"].names
    return {"text": list(rows["text"]), "label": [names.index(label) for label in rows["label"]]}


def by_length(runs: list[dict], lengths, edges: tuple = (128, 256, 512)) -> list[dict]:
    """Return for each range of tokens (`lengths`, one a final text) how many texts it has, and the share that each
    recipe answers right, on average over its seeds."""
    rows, scored = [], [run for run in runs if "final_right" in run]
    for start, end in zip((0, *edges), (*edges, None)):
        inside = (np.array(lengths) > start) & (np.array(lengths) <= (end or np.inf))
        row = {"tokens": f"{start + 1} to {end}" if end else f"more than {start}", "texts": int(inside.sum())}
        for name in dict.fromkeys(run["recipe"] for run in scored if inside.any()):
            right = [common.unpack(run["final_right"])[inside].mean() for run in scored if run["recipe"] == name]
            row[name] = float(np.mean(right))
        rows.append(row)
    return rows


def score_final(name: str, seed: int, folder: str, arguments) -> dict:
    """Score a trained recipe on the texts of `--final`; adapters also merged: how often do the answers agree?"""
    nb, recipe = common.notebook(), RECIPES[name]
    base, adapters, settings = recipe or ("", False, {})
    config, task = common.settle(model_name=folder, seed=seed, **settings)
    split, place = final_texts(arguments.dataset, arguments.final, arguments.tiny), kept(arguments, name, seed)
    if recipe is None:
        model = fit_baseline(name, data(arguments.dataset, seed, arguments.tiny, "published" in name)["train"], seed)
    elif base == "4-bit":
        model = nb.load_adapter(place, config, task.names, task.head)
    elif adapters:
        from peft import load_peft_weights, set_peft_model_state_dict

        model = common.build(base, adapters, config, task.names, task.head)
        set_peft_model_state_dict(model, load_peft_weights(place))
    else:
        model = nb.AutoModelForSequenceClassification.from_pretrained(place)
        model = model.to("cuda" if nb.torch.cuda.is_available() else "cpu")
    right = answer(name, model, task, config, split)
    row = {"final": float(right.mean()), "final_right": common.pack(right)}
    if name in MERGED:
        merged = nb.merge_adapter(place, config, task.names, task.head)
        row["merged_agrees"] = float(np.mean(answer(name, merged, task, config, split) == right))  # two classes
    return row


def summarize(runs: list[dict]) -> list[dict]:
    """Return a row for each recipe: means over seeds with their intervals, and the differences to four others, in
    points, on the same texts."""
    right = {
        (part, run["recipe"], run["seed"]): common.unpack(run[f"{part}_right"])
        for run in runs
        for part in ("test", "final")
        if part in run
    }
    rows = []
    for name in dict.fromkeys(run["recipe"] for run in runs if "validation" in run):
        trained = [run for run in runs if run["recipe"] == name and "validation" in run]
        row = {"name": name, "seeds": [run["seed"] for run in trained]}
        row["validation"] = float(np.mean([run["validation"] for run in trained]))
        for part in ("test", "final"):
            own = {seed: each for (of, recipe, seed), each in right.items() if (of, recipe) == (part, name)}
            shared = {"shared": part == "final"}
            row |= {"final_seeds": [*own]} if part == "final" else {}
            row[part], row[f"{part}_ci95"] = mean_and_interval([*own.values()], **shared) if own else (None, None)
            for other in ("default", "full_finetuning", "tfidf_nb_svm", "recommended, fast"):
                pairs = [(own[seed], right[part, other, seed]) for seed in own if (part, other, seed) in right]
                pairs = [(first, second) for first, second in pairs if len(first) == len(second)]  # of the same texts
                if pairs and other != name:
                    gains = [100.0 * first - 100.0 * second for first, second in pairs]
                    row[f"{part}_over_{other}"] = mean_and_interval(gains, **shared)
        for cost in ("seconds", "peak_mb"):
            known = [run[cost] for run in trained if run.get(cost)]
            row[cost] = float(np.mean(known)) if known else None
        agreed = [run["merged_agrees"] for run in runs if run["recipe"] == name and "merged_agrees" in run]
        rows.append(row | {"merged_agrees": float(np.mean(agreed)) if agreed else None})
    return rows


def main() -> None:
    made = common.parser("recipes", __doc__)
    made.add_argument("--model", default="base", help="random, base, small, a Hub id or a folder")
    made.add_argument(
        "--dataset", default="dipanjanS/imdb_sentiment_finetune_dataset20k", help="Hub id, file or folder"
    )
    made.add_argument("--recipes", nargs="+", default=[*RECIPES][:5], help="`search`, or names: " + "; ".join(RECIPES))
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    made.add_argument("--final", default="", help="texts for the final test of what was trained")
    arguments = made.parse_args()
    if arguments.final and arguments.recipes == ["search"]:
        made.error("a search is scored on validation only. Allowed with --final: " + "; ".join(RECIPES))
    settings = {"model": common.public(arguments.model), "dataset": common.public(arguments.dataset)}
    study = common.Study("recipes", arguments, settings | {"tiny": arguments.tiny}, file="accuracy")
    folder = common.model_folder(arguments.model, arguments.tiny)
    chosen = [*SEARCH] if arguments.recipes == ["search"] else arguments.recipes
    job, key = train, {"job": "train"}
    if arguments.final:
        job, key = score_final, {"job": "final", "texts": common.public(arguments.final)}
    for name in chosen:
        for seed in arguments.seeds:
            study.add(key | {"recipe": name, "seed": seed}, lambda n=name, s=seed: job(n, s, folder, arguments))
            study.write(rows=summarize(study.runs))
    if arguments.final:
        _, task = common.settle(model_name=folder)
        texts = final_texts(arguments.dataset, arguments.final, arguments.tiny)["text"]
        lengths = [len(ids) for ids in task.tokenizer(texts, verbose=False)["input_ids"]]
        shown = [run for run in study.runs if run["recipe"] in [*RECIPES][:5]]
        study.write(by_length=by_length(shown, lengths))


if __name__ == "__main__":
    main()
