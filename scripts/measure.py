"""Measure the notebook's training on one CUDA GPU: speed, memory, accuracy.

    python scripts/measure.py speed                        methods, ladder and arithmetic floor, bert-base shapes
    python scripts/measure.py memory                       what each ingredient saves, and growth, bert-base shapes
    python scripts/measure.py batches                      the largest batches that fit into 4, 8 and 16 GB, bert-base shapes
    python scripts/measure.py accuracy --seeds 1 2 3       the full recipe, trained and tested once for each seed
    python scripts/measure.py embeddings --seeds 1 2 3     lean execution with 16-bit and with 4-bit word embeddings, the full recipe
    python scripts/measure.py ranks --seeds 1 2 3          LoRA ranks and adapted modules, section 11 of the notebook

Settings come from the environment as in the notebook (QLORA_MODEL_NAME, QLORA_DATASET_NAME, QLORA_EXECUTION, ...); "ranks"
trains on the whole training split, as long as the recipe itself unless a setting says otherwise.
"speed", "memory" and "batches" take only the tokenizer and the reviews from there: the model is bert-base by shape, with random
weights, because memory and speed do not depend on their values. The others train several models at a time (--workers).
Results are written as JSON, one file a run.
"""

import argparse
import dataclasses
import json
import logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked later

import datasets
import numpy as np
import torch
import transformers
from import_notebook import import_definitions
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.modeling_layers import GradientCheckpointingLayer

notebook = import_definitions()
DEFAULTS = {  # beside the full profile's
    "QLORA_PROFILE": "full",
    "QLORA_MEMORY_CAPS_GB": "4,8,16",
    "QLORA_RANKS": "1,2,4,8,16,32,64",
    "QLORA_RANK_EPOCHS": "3",
    "QLORA_RANK_BATCH_SIZE": "32",
    "QLORA_RANK_LEARNING_RATE": "2e-4",
}


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


def load_data(config) -> tuple:
    """Return the tokenizer, the splits as text and as tokens: one split, by the seed of ``config``, for all trainings."""
    tokenizer = AutoTokenizer.from_pretrained(notebook.local_or_hub(config.model_name))
    reviews, _ = notebook.clean_reviews(notebook.load_reviews(config.dataset_name))
    splits = notebook.split_reviews(reviews, config.validation_share, config.test_share, config.seed)
    return tokenizer, splits, notebook.tokenize_reviews(splits, tokenizer, config.max_length)


def write(out: Path, name: str, config, results: dict) -> None:
    """Write ``results`` with where and how they were measured."""
    (out / name).write_text(json.dumps(provenance(config) | results, indent=2) + "\n", encoding="utf-8")


def provenance(config) -> dict:
    """Return what was measured where."""
    packages = ["torch", "transformers", "peft", "bitsandbytes", "accelerate"]
    environment = notebook.describe_environment(packages)
    device = environment.pop("device")
    return {"device": device, "versions": environment, "dataset": Path(config.dataset_name).name}


def measure_methods(methods, *arguments) -> list[dict]:
    """Measure each row of ``methods``, printing it."""
    rows = []
    for _, method in methods.iterrows():
        rows.append(notebook.measure_method(method, *arguments))
        print(rows[-1], flush=True)
    return rows


def speed(config, out: Path) -> None:
    """Measure methods, ladder and floor with bert-base shapes and write ``speed.json`` and ``speed_ladder.png``."""
    tokenizer, _, tokenized = load_data(config)
    data = tokenizer, tokenized["train"]
    rate = matrix_rate()
    with tempfile.TemporaryDirectory() as folder:
        random_bert_base(folder, tokenizer)
        config = dataclasses.replace(config, model_name=folder)
        architecture, head = notebook.inspect_model(folder)
        notebook.build_qlora(notebook.carried_out(config), head)  # the first model on a GPU is slow
        ladder = notebook.measure_ladder(config, head, *data)
        print(*ladder, sep="\n", flush=True)
        methods = notebook.efficiency_methods()
        efficiency = measure_methods(methods, config, head, *data)
        whole = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
        (full_at_once,) = measure_methods(methods.loc[["full_fp16"]], dataclasses.replace(config, **whole), head, *data)
        compiled = measure_compiled(config, head, *data)
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
    write(out, "speed.json", config, results)
    notebook.save_figure(notebook.plot_ladder(ladder), str(out), "speed_ladder.png")
    head_count = sum(architecture.get_submodule(name).weight.numel() + 2 for name in head)
    total = sum(parameter.numel() for parameter in architecture.parameters())
    adapters = by_method["qlora_plain"]["trainable_parameters"] - head_count
    estimate = notebook.textbook_estimate(total - head_count, adapters, head_count)
    notebook.save_figure(notebook.plot_efficiency(efficiency, estimate), str(out), "efficiency_comparison.png")
    print(json.dumps({"floor": floor, "ratios": ratios}, indent=2))


def at_rest(config, head: list[str], tokenizer, train) -> dict:
    """Return the MB that the allocator holds after a step of lean training beside the tensors that are counted: a check that nothing is forgotten."""
    seen = {}

    class Look(notebook.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 3:
                held = [*model.parameters(), *model.buffers(), *(each.grad for each in model.parameters())]
                held += [each for name, each in model.named_parameters() for each in notebook.quantization_constants(each)]
                held += [each for values in optimizer.state.values() for each in values.values()]
                held = [each for each in held if each is not None and getattr(each, "is_cuda", False)]
                seen.update(allocated_mb=torch.cuda.memory_allocated() / 1e6, counted_mb=notebook.tensor_bytes(held) / 1e6)
                seen["workspaces_mb"] = notebook.free_workspaces() / 1e6

    config = dataclasses.replace(notebook.carried_out(dataclasses.replace(config, execution="lean")), efficiency_steps=4)
    notebook.release_memory()
    model = notebook.build_qlora(config, head)
    arguments = notebook.short_run(config, "rest", num_train_epochs=1)
    rows = train.select(range(6 * 32))
    notebook.make_trainer(model, arguments, tokenizer, rows, callbacks=[Look()], execution="lean").train()
    return seen


def embedding_peaks(config, head: list[str], tokenizer, train) -> list[dict]:
    """Return the peaks of lean and plain execution, in MB, with word embeddings as they are, and in 4 bits."""
    rows = []
    for execution in ("lean", "plain"):
        for four_bit in (False, True):
            changes = {"execution": execution, "quantize_embeddings": four_bit, "efficiency_steps": 4}
            run = notebook.carried_out(dataclasses.replace(config, **changes))
            notebook.release_memory()
            model = notebook.build_qlora(run, head)
            notebook.release_memory()
            peak = notebook.time_steps(model, run, tokenizer, train)["peak_mb"]
            rows.append({"execution": execution, "four_bit_embeddings": four_bit, "peak_mb": peak})
            del model
    return rows


def memory(config, out: Path) -> None:
    """Measure what each ingredient saves, and growth, with bert-base shapes, and write ``memory.json`` and ``memory_growth.png``."""
    tokenizer, _, tokenized = load_data(config)
    data = tokenizer, tokenized["train"]
    with tempfile.TemporaryDirectory() as folder:
        random_bert_base(folder, tokenizer)
        config = dataclasses.replace(config, model_name=folder)
        architecture, head = notebook.inspect_model(folder)
        notebook.build_qlora(notebook.carried_out(config), head)  # the first model on a GPU is slow
        short = dataclasses.replace(config, efficiency_steps=10)
        results = {"at_rest": at_rest(config, head, *data), "embedding_peaks": embedding_peaks(config, head, *data)}
        print(results, flush=True)
        lean = dataclasses.replace(config, execution="lean")
        base = notebook.load_base(notebook.carried_out(lean), head)
        results["lean_base"] = json.loads(notebook.storage_table(base, head).reset_index(names="part").to_json(orient="records"))
        del base
        ends = notebook.efficiency_methods().loc[["full_fp16", "full_fp16_checkpointing", "qlora_plain"]]
        methods = measure_methods(ends, short, head, *data) + measure_methods(notebook.ingredient_methods(), short, head, *data)
        results |= {"ingredient_methods": methods, "ingredients": notebook.ingredient_savings(methods)}
        print(*results["ingredients"], sep="\n", flush=True)
        growth = notebook.measure_growth(short, head, tokenizer, architecture.config.max_position_embeddings)
        print(*growth, sep="\n", flush=True)
        free, total = torch.cuda.mem_get_info()
        results |= {"growth": growth, "outside_the_allocator_mb": (total - free - torch.cuda.memory_reserved()) / 1e6}
        write(out, "memory.json", config, results)
        figure = notebook.plot_growth(growth, config.max_length, notebook.growth_batch(config))
        notebook.save_figure(figure, str(out), "memory_growth.png")


def batches(config, out: Path) -> None:
    """Find the largest batches under each of ``config.memory_caps_gb`` with bert-base shapes and write ``batches.json``."""
    tokenizer = AutoTokenizer.from_pretrained(notebook.local_or_hub(config.model_name))
    with tempfile.TemporaryDirectory() as folder:
        random_bert_base(folder, tokenizer)
        config = dataclasses.replace(config, model_name=folder, growth_lengths=[], efficiency_steps=1)
        architecture, head = notebook.inspect_model(folder)
        growth = notebook.measure_growth(config, head, tokenizer, architecture.config.max_position_embeddings)
        largest = notebook.measure_caps(growth, config, head, tokenizer)
    print(*largest, sep="\n", flush=True)
    write(out, "batches.json", config, {"largest_batch": largest})


def quiet() -> None:
    """Turn off what the notebook turns off."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
    notebook.sns.set_theme(style="whitegrid", palette="colorblind")
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


def share(*data) -> None:
    """Keep the splits, as text and as tokens, for the trainings of this process."""
    global splits, tokenized
    splits, tokenized = data


def start_worker(folder: str) -> None:
    """Load what all trainings of a worker share from ``folder``."""
    # A spawned process would spawn the workers of its data loaders too, each importing everything anew, every epoch.
    multiprocessing.set_start_method("fork", force=True)
    quiet()
    share(*(datasets.load_from_disk(f"{folder}/{name}") for name in ("splits", "tokenized")))


def in_workers(job, arguments: list[tuple], config, workers: int) -> Iterator:
    """Yield ``job(*each)`` for each of ``arguments``, in their order, ``workers`` at a time on one GPU."""
    _, *data = load_data(config)
    if workers == 1:
        share(*data)
        yield from map(job, *zip(*arguments))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, part in zip(("splits", "tokenized"), data):
            part.save_to_disk(f"{folder}/{name}")
        processes = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, processes, start_worker, (folder,)) as pool:
            yield from pool.map(job, *zip(*arguments))


def train_and_score(config, seed: int) -> dict:
    """Train the recipe of ``config``, carried out, with ``seed``; return time, peak, scores, and which reviews are right."""
    tokenizer = AutoTokenizer.from_pretrained(notebook.local_or_hub(config.model_name))
    _, head = notebook.inspect_model(config.model_name)
    run = dataclasses.replace(config, seed=seed)
    notebook.release_memory()
    start = time.perf_counter()
    model = notebook.build_qlora(run, head)
    with tempfile.TemporaryDirectory() as folder:
        arguments = notebook.training_arguments(run, folder, disable_tqdm=True)
        stop = notebook.EarlyStoppingCallback(early_stopping_patience=run.early_stopping_patience)
        data = tokenized["train"], tokenized["validation"]
        trainer = notebook.make_trainer(model, arguments, tokenizer, *data, callbacks=[stop], execution=run.execution)
        trainer.train()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e6
    kept = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=run.execution == "plain")
    right, scores = {}, {}
    for name in ("validation", "test"):
        predictions = notebook.predict_logits(kept, tokenizer, list(splits[name]["text"]), run.max_length).argmax(-1)
        right[name] = predictions == np.array(splits[name]["label"])
        scores[name] = notebook.score(splits[name]["label"], predictions, seed)
    record = {"seed": seed, "seconds": seconds, "peak_mb": peak, "epochs": trainer.state.epoch}
    record |= {"validation_accuracy": scores["validation"]["accuracy"], **scores["test"]}
    print(run.execution, run.quantize_embeddings, record, flush=True)
    return {"record": record, "right": right}


def recipe(config) -> dict:
    """Return the settings of the full recipe that accuracies depend on."""
    names = ("execution", "learning_rate", "num_train_epochs", "max_length")
    return {"model": Path(config.model_name).name} | {name: getattr(config, name) for name in names}


def accuracy(config, seeds: list[int], workers: int, out: Path) -> None:
    """Train the recipe of ``config`` for each seed, test it, and write ``accuracy-<execution>-<seeds>.json``."""
    jobs = [(notebook.carried_out(config), seed) for seed in seeds]
    runs = [run["record"] for run in in_workers(train_and_score, jobs, config, workers)]
    results = recipe(config) | {"workers": workers, "runs": runs}
    write(out, f"accuracy-{config.execution}-{'-'.join(map(str, seeds))}.json", config, results)


def embeddings(config, seeds: list[int], workers: int, out: Path) -> None:
    """Train the recipe in lean execution with 16-bit and 4-bit word embeddings, and write ``embeddings.json``, anew after each seed."""
    config = dataclasses.replace(config, execution="lean")
    variants = {"16-bit": False, "4-bit": True}
    lean = {name: notebook.carried_out(dataclasses.replace(config, quantize_embeddings=value)) for name, value in variants.items()}
    jobs = [(lean[name], seed) for seed in seeds for name in variants]
    done = []
    for run in in_workers(train_and_score, jobs, config, workers):
        done.append(run)
        if len(done) % 2:
            continue
        runs = dict(zip(variants, (done[0::2], done[1::2])))
        difference = {}
        for split in ("validation", "test"):
            right = {name: np.stack([each["right"][split] for each in runs[name]]) for name in variants}
            difference[split] = notebook.summarize_seeds(right["4-bit"], right["16-bit"])
        results = recipe(config) | {"workers": workers, "four_bit_against_16_bit": difference}
        results["runs"] = {name: [each["record"] for each in runs[name]] for name in variants}
        write(out, "embeddings.json", config, results)
    print(json.dumps(difference), flush=True)


def train_at_rank(config, modules: list[str], r: int, seed: int):
    """Return ``right_answers`` of one training of section 11."""
    tokenizer = AutoTokenizer.from_pretrained(notebook.local_or_hub(config.model_name))
    _, head = notebook.inspect_model(config.model_name)
    notebook.release_memory()
    config = dataclasses.replace(config, target_modules=modules)
    right = notebook.right_answers(config, head, tokenizer, tokenized["train"], splits["validation"], r, seed)
    print(len(modules), r, seed, right.mean(), flush=True)
    return right


def ranks(config, seeds: list[int], workers: int, out: Path) -> None:
    """Train every rank of ``config.ranks``, and every choice of modules, for each seed by the ``rank_`` settings; write ``ranks-<learning rate>.json`` and a figure, anew after each seed."""
    config = notebook.carried_out(config)
    architecture, head = notebook.inspect_model(config.model_name)
    choices = notebook.module_choices(architecture, config)
    first = next(iter(choices))
    runs = [(first, r) for r in sorted({*config.ranks, config.lora_r})]
    runs += [(target, config.lora_r) for target in choices if target != first]
    jobs = [(config, choices[target], r, seed) for seed in seeds for target, r in runs]
    answers = []
    for answer in in_workers(train_at_rank, jobs, config, workers):
        answers.append(answer)
        if len(answers) % len(runs):
            continue
        right = {run: np.stack(answers[row :: len(runs)]) for row, run in enumerate(runs)}
        rank_sensitivity, adapted_modules = notebook.rank_results(right, choices, config, head)
        settings = {"model": Path(config.model_name).name, "execution": config.execution, "reviews": len(answer)}
        settings |= {name: getattr(config, name) for name in ("rank_epochs", "rank_batch_size", "rank_learning_rate", "max_length")}
        name = f"{config.rank_learning_rate:g}"
        write(out, f"ranks-{name}.json", config, settings | {"rank_sensitivity": rank_sensitivity, "adapted_modules": adapted_modules})
        figure = notebook.plot_ranks(rank_sensitivity, adapted_modules, config.lora_r, config.rank_learning_rate)
        notebook.save_figure(figure, str(out), f"lora_rank_sensitivity-{name}.png")


if __name__ == "__main__":
    commands = {"speed": speed, "memory": memory, "batches": batches, "accuracy": accuracy, "embeddings": embeddings, "ranks": ranks}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(commands))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=Path("outputs") / "measured", help="folder for the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed, and PyTorch finds none here.")
    quiet()
    config, _ = notebook.resolve_config(DEFAULTS | dict(os.environ), cuda=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what in ("speed", "memory", "batches"):
        commands[arguments.what](config, arguments.out)
    else:
        commands[arguments.what](config, arguments.seeds, arguments.workers, arguments.out)
