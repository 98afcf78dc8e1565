"""Measure the notebook's training on one CUDA GPU: how fast each way to carry out a step is, and whether it stays as accurate.

    python scripts/measure_speed.py speed                        methods, ladder and arithmetic floor, bert-base shapes
    python scripts/measure_speed.py accuracy --seeds 1 2 3       the full recipe, trained and tested once for each seed

Settings come from the environment as in the notebook (QLORA_MODEL_NAME, QLORA_DATASET_NAME, QLORA_EXECUTION, ...).
"speed" takes only the tokenizer and the reviews from there: the model is bert-base by shape, with random weights,
because memory and speed do not depend on their values. Results are written as JSON, one file a run.
"""

import argparse
import dataclasses
import json
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked later

import datasets
import torch
import transformers
from import_notebook import import_definitions
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.modeling_layers import GradientCheckpointingLayer

notebook = import_definitions()


def matrix_rate(size: int = 8192, repeats: int = 20) -> float:
    """Return the FLOP/s of a ``size``-cube fp16 matrix product."""
    left, right = torch.randn((2, size, size), device="cuda", dtype=torch.float16)
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def training_flops(config, head_modules: list[str], batch: int, adapters: bool) -> int:
    """Count the floating-point operations of one forward and backward pass, as PyTorch counts them, on the ``meta`` device: of the LoRA model, or of full fine-tuning. 4-bit weights are expanded to the same products."""
    model, _ = notebook.inspect_model(config.model_name)
    model = model.to("meta").train()
    if adapters:
        with torch.device("meta"):
            model = notebook.get_peft_model(model, notebook.lora_config(config, head_modules))
    ids = torch.ones((batch, config.max_length), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids[:, 0]).loss.backward()
    return counter.get_total_flops()


def random_bert_base(folder: str, tokenizer) -> None:
    """Write a bert-base-uncased with random weights to ``folder``."""
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure_compiled(config, head_modules: list[str], tokenizer, train) -> dict:
    """Measure ``fast`` with every layer compiled beside the recording, and how long it takes to get going."""
    config = notebook.carried_out(dataclasses.replace(config, execution="fast"))
    notebook.release_memory()
    start = time.perf_counter()
    model = notebook.build_qlora(config, head_modules)
    for layer in (each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)):
        layer.compile(dynamic=False)
    # transformers leaves out a mask without padding, but not in a recording, which would compile
    # anew there. One token less and there is padding, so the mask is always made.
    train = train.map(lambda row: {name: row[name][: config.max_length - 1] for name in row if name != "label"})
    measured = notebook.time_steps(model, config, tokenizer, train)
    return {"rung": "fast, with torch.compile", **measured, "seconds_with_start": time.perf_counter() - start}


def speed(config, out: Path) -> None:
    """Measure methods, ladder and floor with bert-base shapes and write ``speed.json`` and ``speed_ladder.png``."""
    tokenizer = AutoTokenizer.from_pretrained(notebook.local_or_hub(config.model_name))
    reviews, _ = notebook.clean_reviews(notebook.load_reviews(config.dataset_name))
    splits = notebook.split_reviews(reviews, config.validation_share, config.test_share, config.seed)
    train = notebook.tokenize_reviews(splits, tokenizer, config.max_length)["train"]
    rate = matrix_rate()
    with tempfile.TemporaryDirectory() as folder:
        random_bert_base(folder, tokenizer)
        config = dataclasses.replace(config, model_name=folder)
        _, head = notebook.inspect_model(folder)
        notebook.build_qlora(notebook.carried_out(config), head)  # the first model on a GPU is slow
        ladder = notebook.measure_ladder(config, head, tokenizer, train)
        print(*ladder, sep="\n", flush=True)
        efficiency = []
        for method in notebook.efficiency_methods().index:
            efficiency.append(notebook.measure_method(method, config, head, tokenizer, train))
            print(efficiency[-1], flush=True)
        whole = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
        whole_config = dataclasses.replace(config, **whole)
        full_at_once = notebook.measure_method("full_fp16", whole_config, head, tokenizer, train)
        print(full_at_once, flush=True)
        compiled = measure_compiled(config, head, tokenizer, train)
        print(compiled, flush=True)
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        flops = {name: training_flops(config, head, batch, name == "qlora") for name in ("qlora", "full")}
    by_method = {row["method"]: row for row in efficiency}
    floor = {
        "matrix_tflops": rate / 1e12,
        **{f"{name}_tflop_a_step": count / 1e12 for name, count in flops.items()},
        **{f"{name}_samples_per_second": batch * rate / count for name, count in flops.items()},
    }
    speeds = {name: by_method[f"qlora_{name}"]["samples_per_second"] for name in ("plain", "lean", "fast")}
    ratios = {
        "fast_over_plain": speeds["fast"] / speeds["plain"],
        "lean_over_plain": speeds["lean"] / speeds["plain"],
        "fast_over_full_fp16": speeds["fast"] / by_method["full_fp16"]["samples_per_second"],
        "fast_over_full_fp16_32x1": speeds["fast"] / full_at_once["samples_per_second"],
        "fast_share_of_floor": speeds["fast"] / floor["qlora_samples_per_second"],
        "lean_share_of_floor": speeds["lean"] / floor["qlora_samples_per_second"],
    }
    results = {
        **provenance(config),
        "tokens": config.max_length,
        "batch": [config.per_device_train_batch_size, config.gradient_accumulation_steps],
        "steps": config.efficiency_steps,
        "efficiency": efficiency,
        "full_fp16_32x1": full_at_once,
        "ladder": ladder,
        "tried": [compiled],
        "floor": floor,
        "ratios": ratios,
    }
    (out / "speed.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    notebook.save_figure(notebook.plot_ladder(ladder), str(out), "speed_ladder.png")
    print(json.dumps({"floor": floor, "ratios": ratios}, indent=2))


def provenance(config) -> dict:
    """Return what was measured where."""
    packages = ["torch", "transformers", "peft", "bitsandbytes", "accelerate"]
    environment = notebook.describe_environment(packages)
    device = environment.pop("device")
    return {"device": device, "versions": environment, "dataset": Path(config.dataset_name).name}


def accuracy(config, seeds: list[int], out: Path) -> None:
    """Train the recipe of ``config`` for each seed, test it, and write ``accuracy-<execution>-<seeds>.json``."""
    tokenizer = AutoTokenizer.from_pretrained(notebook.local_or_hub(config.model_name))
    _, head = notebook.inspect_model(config.model_name)
    reviews, _ = notebook.clean_reviews(notebook.load_reviews(config.dataset_name))
    # One split, by the seed of `config`, for all seeds of the training.
    splits = notebook.split_reviews(reviews, config.validation_share, config.test_share, config.seed)
    tokenized = notebook.tokenize_reviews(splits, tokenizer, config.max_length)
    runs = []
    for seed in seeds:
        run = notebook.carried_out(dataclasses.replace(config, seed=seed))
        notebook.release_memory()
        start = time.perf_counter()
        model = notebook.build_qlora(run, head)
        arguments = notebook.training_arguments(run, str(out / f"checkpoints-{run.execution}-{seed}"), disable_tqdm=True)
        stop = notebook.EarlyStoppingCallback(early_stopping_patience=run.early_stopping_patience)
        data = tokenized["train"], tokenized["validation"]
        trainer = notebook.make_trainer(model, arguments, tokenizer, *data, callbacks=[stop], execution=run.execution)
        trainer.train()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 1e6
        logits = notebook.predict_logits(
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=run.execution == "plain"),
            tokenizer, list(splits["test"]["text"]), run.max_length,
        )
        scores = notebook.score(splits["test"]["label"], logits.argmax(-1), seed)
        best = trainer.state.best_metric
        runs.append({"seed": seed, "seconds": seconds, "peak_mb": peak, "epochs": trainer.state.epoch, "validation_accuracy": best, **scores})
        print(run.execution, runs[-1], flush=True)
        del model, trainer
    settings = {name: getattr(config, name) for name in ("execution", "learning_rate", "num_train_epochs", "max_length")}
    results = {**provenance(config), "model": Path(config.model_name).name, **settings, "runs": runs}
    name = f"accuracy-{config.execution}-{'-'.join(map(str, seeds))}.json"
    (out / name).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "accuracy"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("outputs") / "speed", help="folder for the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed, and PyTorch finds none here.")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
    notebook.sns.set_theme(style="whitegrid", palette="colorblind")  # as in the notebook
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    config, _ = notebook.resolve_config({"QLORA_PROFILE": "full"} | dict(os.environ), cuda=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "speed":
        speed(config, arguments.out)
    else:
        accuracy(config, arguments.seeds, arguments.out)
