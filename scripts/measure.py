"""Measure the notebook's training on CUDA GPUs: speed, memory, accuracy; and the bags of words, on a CPU.

    python scripts/measure.py speed                        methods, ladder and arithmetic floor, bert-base shapes
    python scripts/measure.py memory                       what each ingredient saves, and growth, bert-base shapes
    python scripts/measure.py overview                     memory and speed of the methods whose accuracy "recipes" and "accuracy" tell
    python scripts/measure.py batches                      the largest batches that fit into 4, 8 and 16 GB, bert-base shapes
    python scripts/measure.py accuracy --seeds 1 2 3       the full recipe, trained and tested once for each seed
    python scripts/measure.py embeddings --seeds 1 2 3     lean execution with 16-bit and with 4-bit word embeddings, the full recipe
    python scripts/measure.py ranks --seeds 1 2 3          LoRA ranks and adapted modules, section 11 of the notebook
    python scripts/measure.py short --seeds 1 2 3          section 11's short trainings as the full profile has them, and in steps of 8 reviews
    python scripts/measure.py recipes --seeds 1 2 3        the road from the mission's recipe to the recommended one, and its rivals
    python scripts/measure.py baselines                    the bags of words, on both layouts of the data set; needs no GPU
    python scripts/measure.py mistakes                     fifty mistakes of the recommended recipe, to read; needs no GPU, but what recipes wrote
    python scripts/measure.py search --seeds 1             the variants that the recommended recipe was chosen from, on the validation split

Settings come from the environment as in the notebook (QLORA_MODEL_NAME, QLORA_DATASET_NAME, QLORA_EXECUTION, ...); "ranks"
trains on the whole training split, as long as the recipe itself unless a setting says otherwise.
"speed", "memory" and "batches" take only the tokenizer and the reviews from there: the model is bert-base by shape, with random
weights, because memory and speed do not depend on their values. The others train several models at a time (--workers; "recipes"
and "search" on each GPU).
Results are written as JSON, one file a run.
"""

import argparse
import dataclasses
import functools
import json
import logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked later

import datasets
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from import_notebook import import_definitions
from matplotlib.figure import Figure
from peft.optimizers import create_loraplus_optimizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel
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
    model, _ = notebook.inspect_model(config.model_name, config.model_revision)
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


def inspect(config, folder: str | None = None) -> tuple:
    """Return the model of ``config``, or in ``folder``, on the ``meta`` device, and what is trained whole beside its adapters."""
    source = (folder,) if folder else (config.model_name, config.model_revision)
    architecture, _ = notebook.inspect_model(*source)
    return architecture, notebook.trained_whole(architecture, config.train_pooler)


def load_data(config) -> tuple:
    """Return the tokenizer, the splits as text and as tokens: one split, by the seed of ``config``, for all trainings."""
    tokenizer = notebook.load_tokenizer(config.model_name, config.model_revision)
    splits, _ = notebook.prepare_splits(config)
    return tokenizer, splits, notebook.tokenize_reviews(splits, tokenizer, config.max_length, config.tail_share)


def both_layouts(config) -> dict[str, datasets.DatasetDict]:
    """Return the splits of both layouts of the data set, as text."""
    return {layout: notebook.prepare_splits(dataclasses.replace(config, layout=layout))[0] for layout in ("pooled", "published")}


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
        architecture, head = inspect(config, folder)
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
        architecture, head = inspect(config, folder)
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


def overview(config, out: Path) -> None:
    """Measure memory and speed of full fine-tuning, and of QLoRA by the mission's recipe and by the recommended one, with the model and the reviews of the
    settings, and write ``overview.json``."""
    tokenizer, _, tokenized = load_data(config)
    methods, rows = notebook.efficiency_methods(), []
    names = {"mission": ["full_fp16", "qlora_plain", "qlora_lean", "qlora_fast"], "recommended": ["qlora_plain", "qlora_lean", "qlora_fast"]}
    for recipe, chosen in names.items():
        run = dataclasses.replace(config, **notebook.recipe_values(recipe))
        _, head = inspect(run)
        if not rows:
            notebook.build_qlora(notebook.carried_out(run), head)  # the first model on a GPU is slow
        measured = measure_methods(methods.loc[chosen], run, head, tokenizer, tokenized["train"])
        rows += [{"recipe": recipe} | row for row in measured]
    settings = {"model": Path(config.model_name).name, "tokens": config.max_length, "steps": config.efficiency_steps}
    batch = [config.per_device_train_batch_size, config.gradient_accumulation_steps]
    write(out, "overview.json", config, settings | {"batch": batch, "efficiency": rows})


def batches(config, out: Path) -> None:
    """Find the largest batches under each of ``config.memory_caps_gb`` with bert-base shapes and write ``batches.json``."""
    tokenizer = notebook.load_tokenizer(config.model_name, config.model_revision)
    with tempfile.TemporaryDirectory() as folder:
        random_bert_base(folder, tokenizer)
        config = dataclasses.replace(config, model_name=folder, growth_lengths=[], efficiency_steps=1)
        architecture, head = inspect(config, folder)
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
    tokenizer = notebook.load_tokenizer(config.model_name, config.model_revision)
    _, head = inspect(config)
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
        predictions = notebook.predict_logits(kept, tokenizer, list(splits[name]["text"]), run.max_length, run.tail_share).argmax(-1)
        right[name] = predictions == np.array(splits[name]["label"])
        scores[name] = notebook.score(splits[name]["label"], predictions, seed)
    record = {"seed": seed, "seconds": seconds, "peak_mb": peak, "epochs": trainer.state.epoch}
    record |= {"validation_accuracy": scores["validation"]["accuracy"], **scores["test"]}
    print(run.execution, run.quantize_embeddings, record, flush=True)
    return {"record": record, "right": right}


def recipe(config) -> dict:
    """Return the settings of the full recipe that accuracies depend on."""
    names = ("execution", "learning_rate", "num_train_epochs", "max_length", "tail_share", "target_modules", "train_pooler", "optim")
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


def train_at_rank(config, modules: list[str], r: int, seed: int, reviews: int | None = None):
    """Return ``right_answers`` of one training of section 11, on ``reviews`` of the training split, or on all."""
    tokenizer = notebook.load_tokenizer(config.model_name, config.model_revision)
    _, head = inspect(config)
    notebook.release_memory()
    config = dataclasses.replace(config, target_modules=modules)
    train = tokenized["train"]
    if reviews:
        train = train.shuffle(seed=notebook.Config.seed).select(range(reviews))
    right = notebook.right_answers(config, head, tokenizer, train, splits["validation"], r, seed)
    print(len(modules), r, seed, right.mean(), flush=True)
    return right


def ranks(config, seeds: list[int], workers: int, out: Path) -> None:
    """Train every rank of ``config.ranks``, and every choice of modules, for each seed by the ``rank_`` settings; write ``ranks-<learning rate>.json`` and a figure, anew after each seed."""
    config = notebook.carried_out(config)
    architecture, head = inspect(config)
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


def short(config, seeds: list[int], workers: int, out: Path) -> None:
    """Train section 11's ranks and modules on as few reviews as the full profile does, in steps of 8 reviews (one epoch) and as it has them; write ``short.json``."""
    defaults = notebook.Config()
    config = dataclasses.replace(config, rank_learning_rate=defaults.rank_learning_rate, ranks=defaults.ranks)
    config = notebook.carried_out(config)
    reviews, steps = defaults.rank_train_samples, ((8, 1.0), (defaults.rank_batch_size, defaults.rank_epochs))
    architecture, _ = inspect(config)
    choices = notebook.module_choices(architecture, config)
    first = next(iter(choices))
    runs = [(first, r) for r in config.ranks] + [(target, config.lora_r) for target in choices if target != first]
    kinds = [(batch, epochs, target, r) for batch, epochs in steps for target, r in runs]
    configs = {size: dataclasses.replace(config, rank_batch_size=size[0], rank_epochs=size[1]) for size in steps}
    jobs = [(configs[batch, epochs], choices[target], r, seed, reviews) for batch, epochs, target, r in kinds for seed in seeds]
    answers = list(in_workers(train_at_rank, jobs, config, workers))
    rows = []
    for index, (batch, epochs, target, r) in enumerate(kinds):
        scores = [float(answer.mean()) for answer in answers[index * len(seeds) : (index + 1) * len(seeds)]]
        rows.append({"batch": batch, "epochs": epochs, "modules": target, "rank": r, "accuracy": scores})
    settings = {"model": Path(config.model_name).name, "execution": config.execution, "sampling": config.train_sampling_strategy, "train_reviews": reviews}
    settings |= {"learning_rate": config.rank_learning_rate, "validation_reviews": len(answers[0]), "seeds": seeds}
    write(out, "short.json", config, settings | {"trainings": rows})
    print(json.dumps(rows), flush=True)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to train: what it changes of ``Config``, and whether it is full fine-tuning; ``loraplus`` multiplies the learning rate of LoRA's B; without
    ``four_bit`` the base of the adapters stays in fp16."""

    name: str
    changes: dict
    full: bool = False
    loraplus: float | None = None
    four_bit: bool = True


def road() -> list[Variant]:
    """Return the recipes from ``mission`` to ``recommended``, one change a step."""
    steps = {
        "mission": {},
        "learning rate 1e-3": {"learning_rate": 1e-3},
        "half of the tokens from the end": {"tail_share": 0.5},
        "adapters on all linear layers": {"target_modules": ["all-linear"]},
        "pooler trained": {"train_pooler": True},
        "recommended": {"num_train_epochs": 5.0},
    }
    variants, changes = [], {}
    for name, change in steps.items():
        changes = changes | change
        variants.append(Variant(name, changes))
    return variants


def rivals() -> list[Variant]:
    """Return full fine-tuning at two learning rates, of which the validation split chooses."""
    changes = {"tail_share": 0.5, "num_train_epochs": 5.0}
    return [Variant(f"full_finetuning {rate:g}", changes | {"learning_rate": rate}, full=True) for rate in (5e-5, 3e-5)]


def all_variants() -> list[Variant]:
    """Return what ``recipes`` trains, the most wanted first: the road and its rivals, the published layout, 512 tokens, full fine-tuning with other cuts, and
    single changes of the recommended recipe: of its optimizer first, and of the rest with the faster optimizer that this brought."""
    first, *steps, recommended = road()
    full, full_slower = rivals()

    def also(change: dict, name: str, *variants: Variant) -> list[Variant]:
        return [dataclasses.replace(each, name=f"{each.name}, {name}", changes=each.changes | change) for each in variants]

    return [
        *(recommended, full, full_slower, first),
        *steps,
        *also({"layout": "published"}, "published splits", recommended, full, first),
        *also({"max_length": 512}, "512 tokens", full, first, recommended),
        *also({"tail_share": 0.0}, "tail 0", full),
        *also({"tail_share": 0.25}, "tail 0.25", full),
        *(fused := also({"optim": "adamw_torch_fused"}, "32-bit fused AdamW", recommended)),
        *(dataclasses.replace(each, four_bit=False) for each in also({}, "16-bit base", *fused)),
        *also({"use_rslora": True, "learning_rate": 3e-4}, "rank-stabilised at 3e-4", *fused),
        *(dataclasses.replace(each, loraplus=4) for each in also({"learning_rate": 4e-4}, "LoRA+ 4 at 4e-4", *fused)),
        *also({"lora_r": 4, "lora_alpha": 8}, "rank 4", *fused),
        *also({"learning_rate": 5e-4}, "learning rate 5e-4", *fused),
        *also({"lr_scheduler_type": "linear"}, "linear schedule", *fused),
    ]


def searched() -> list[Variant]:
    """Return the variants that the recommended recipe was chosen from, and those of full fine-tuning."""
    mission, *_, pooler, recommended = (each.changes for each in road())
    half = pooler | {"learning_rate": 5e-4}
    variants = [Variant(f"query, value, {rate:g}, tail {tail:g}", {"learning_rate": rate, "tail_share": tail}) for rate, tail in ((2e-4, 0), (1e-3, 0), (1e-3, 0.5))]
    variants += [Variant("query, value, 1e-3, tail 0.5, pooler", mission | {"learning_rate": 1e-3, "tail_share": 0.5, "train_pooler": True})]
    variants += [Variant(f"all linear, no pooler, {rate:g}", pooler | {"train_pooler": False, "learning_rate": rate}) for rate in (5e-4, 1e-3)]
    variants += [Variant(f"all linear, pooler, {rate:g}", pooler | {"learning_rate": rate}) for rate in (3e-4, 5e-4, 1e-3, 2e-3)]
    variants += [Variant(f"1e-3, tail {tail:g}", pooler | {"tail_share": tail}) for tail in (0.25, 0.75, 1)]
    single = {f"dropout {share:g}": {"lora_dropout": share} for share in (0, 0.05, 0.2)}
    single |= {f"rank {rank}": {"lora_r": rank, "lora_alpha": 2 * rank} for rank in (8, 32, 64)}
    single |= {"rank-stabilised": {"use_rslora": True}, "rank-stabilised, rank 64": {"use_rslora": True, "lora_r": 64}}
    single |= {"weight decay 0.1": {"weight_decay": 0.1}}
    single |= {schedule: {"lr_scheduler_type": schedule} for schedule in ("linear", "constant_with_warmup")}
    variants += [Variant(f"5e-4, {name}", half | change) for name, change in single.items()]
    variants += [Variant("1e-3, steps of 64", pooler | {"per_device_train_batch_size": 32})]
    variants += [Variant(f"LoRA+ {ratio}, 2e-4", half | {"learning_rate": 2e-4}, loraplus=ratio) for ratio in (4, 16)]
    single = {f"{rate:g}": {"learning_rate": rate} for rate in (3e-4, 5e-4, 7e-4, 1e-3, 1.4e-3)}
    single |= {"dropout 0": {"lora_dropout": 0.0}, "weight decay 0.1": {"weight_decay": 0.1}, "linear": {"lr_scheduler_type": "linear"}}
    single |= {"steps of 64": {"per_device_train_batch_size": 32}, "tail 0.25": {"tail_share": 0.25}}
    single |= {f"rank {rank}, {rate:g}": {"lora_r": rank, "lora_alpha": 2 * rank, "learning_rate": rate} for rank, rate in ((4, 1e-3), (8, 7e-4), (64, 5e-4), (64, 1e-3))}
    variants += [Variant(f"5 epochs, {name}", recommended | change) for name, change in single.items()]
    full = {"tail_share": 0.5, "num_train_epochs": 3.0}
    variants += [Variant(f"full fine-tuning, {rate:g}", full | {"learning_rate": rate}, full=True) for rate in (5e-5, 1e-4, 2e-4)]
    return variants + [Variant(f"full fine-tuning, 5 epochs, {rate:g}", full | {"learning_rate": rate, "num_train_epochs": 5.0}, full=True) for rate in (3e-5, 5e-5, 1e-4)]


def variant_config(config, variant: Variant, seed: int, optim: str = "adamw_8bit"):
    """Return ``config`` as ``variant`` trains it: fast, with ``optim`` for adapters, and fused AdamW for full fine-tuning."""
    optim = "adamw_torch_fused" if variant.full else optim
    changes = {"execution": "fast", "optim": optim, "seed": seed} | variant.changes
    return notebook.carried_out(dataclasses.replace(config, **changes))


def start_variants(folder: str, counter, gpus: int) -> None:
    """Let this worker use one of ``gpus`` GPUs, in turn, and load uncut tokens from ``folder``."""
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    quiet()
    global uncut
    uncut = {path.name: datasets.load_from_disk(str(path)) for path in Path(folder).iterdir()}


@functools.cache
def cut_tokens(layout: str, max_length: int, tail_share: float) -> datasets.DatasetDict:
    """Return the tokens of ``layout``, cut by ``cut_middle``."""
    return uncut[layout].map(
        lambda batch: {name: [notebook.cut_middle(row, max_length, tail_share) for row in batch[name]] for name in batch if name != "label"},
        batched=True,
        keep_in_memory=True,
    )


def build_variant(run, variant: Variant, head: list[str]) -> torch.nn.Module:
    """Return the model that ``variant`` trains, as ``run`` has it."""
    if not variant.full and variant.four_bit:
        return notebook.build_qlora(run, head)
    dtype = torch.float32 if variant.full else torch.float16
    model = notebook.load_classifier(run.model_name, run.seed, dtype=dtype, revision=run.model_revision)
    if variant.full:
        return model
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in head:
            module.float()
    return notebook.add_adapters(model, run, head)


def train_variant(config, variant: Variant, seed: int, tested: bool) -> dict:
    """Train ``variant`` with ``seed``, with an 8-bit optimizer if it is to be ``tested``, and the faster fused AdamW if not.

    Returns:
        ``variant``, ``seed``, ``seconds``, ``validation`` (the accuracy of the best epoch), ``epochs`` (of each), ``recorded``, and the
        logits of the splits that were predicted: of validation and test if ``tested``.
    """
    run = variant_config(config, variant, seed, "adamw_8bit" if tested else "adamw_torch_fused")
    tokenizer = notebook.load_tokenizer(run.model_name, run.model_revision)
    _, head = inspect(run)
    tokens = cut_tokens(run.layout, run.max_length, run.tail_share)
    notebook.release_memory()
    start = time.perf_counter()
    model = build_variant(run, variant, head)
    with tempfile.TemporaryDirectory() as folder:
        arguments = notebook.training_arguments(run, folder, disable_tqdm=True, save_only_model=True, logging_strategy="no")
        stop = notebook.EarlyStoppingCallback(early_stopping_patience=run.early_stopping_patience)
        trainer = notebook.make_trainer(model, arguments, tokenizer, tokens["train"], tokens["validation"], callbacks=[stop], execution="fast")
        if variant.full:  # its weights are 32-bit: products in fp16 need autocast, without its cache, which a recording cannot keep
            trainer.accelerator.autocast_handler = notebook.AutocastKwargs(cache_enabled=False)
        if variant.loraplus:
            kind, options = notebook.Trainer.get_optimizer_cls_and_kwargs(arguments)
            trainer.optimizer = create_loraplus_optimizer(
                model, kind, loraplus_lr_ratio=variant.loraplus, loraplus_weight_decay=run.weight_decay, **options
            )
        trainer.train()
    seconds = time.perf_counter() - start
    kept = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    logits = {}
    for name in ("validation", "test") if tested else ():
        encoded = {key: list(tokens[name][key]) for key in tokens[name].column_names if key != "label"}
        with torch.autocast("cuda", torch.float16, enabled=variant.full and torch.cuda.is_available()):
            logits[name] = notebook.predict_encoded(kept, tokenizer, encoded)
    epochs = [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line]
    row = {"variant": variant, "seed": seed, "seconds": seconds, "validation": max(epochs), "epochs": epochs, "recorded": trainer.records}
    print(variant.name, {name: value for name, value in row.items() if name != "variant"}, flush=True)
    return row | {"logits": logits}


def trained_variants(config, splits: dict, variants: list[Variant], seeds: list[int], workers: int, tested: bool) -> Iterator[dict]:
    """Yield ``train_variant`` of each variant for each seed, as they are done: all seeds of the first variant first, ``workers`` at a time on each GPU."""
    tokenizer = notebook.load_tokenizer(config.model_name, config.model_revision)
    with tempfile.TemporaryDirectory() as folder:
        for layout in {each.changes.get("layout", config.layout) for each in variants}:
            notebook.tokenize_reviews(splits[layout], tokenizer, max_length=10**6).save_to_disk(f"{folder}/{layout}")
        processes = multiprocessing.get_context("spawn")
        gpus = max(1, torch.cuda.device_count())
        arguments = folder, processes.Value("i", 0), gpus
        with ProcessPoolExecutor(workers * gpus, processes, start_variants, arguments) as pool:
            jobs = [pool.submit(train_variant, config, variant, seed, tested) for variant in variants for seed in seeds]
            for job in as_completed(jobs):
                yield job.result()


def search(config, seeds: list[int], workers: int, out: Path) -> None:
    """Train every variant of ``searched`` and write their validation accuracies to ``search.json``, anew after each."""
    done = []
    for run in trained_variants(config, both_layouts(config), searched(), seeds, workers, tested=False):
        done.append({"variant": run["variant"].name} | {name: run[name] for name in ("seed", "validation", "epochs")})
        optimizer = {"optimizer_of_adapters": "adamw_torch_fused"}
        write(out, "search.json", config, recipe_settings(config) | optimizer | {"runs": sorted(done, key=lambda row: -row["validation"])})


def recipe_settings(config) -> dict:
    """Return what all variants share."""
    return {"model": Path(config.model_name).name, "execution": "fast"}


def labels_of(splits: datasets.DatasetDict) -> dict[str, np.ndarray]:
    """Return the labels of each split."""
    return {name: np.array(split["label"]) for name, split in splits.items()}


def settings_of(config, variant: Variant) -> dict:
    """Return the settings that tell ``variant`` from others."""
    used = variant_config(config, variant, seed=0)
    names = ["layout", "seed_of_the_split", "max_length", "tail_share", "learning_rate", "num_train_epochs", "optim", "lr_scheduler_type", "warmup_ratio", "weight_decay"]
    names += [] if variant.full else ["lora_r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "train_pooler"]
    batch = used.per_device_train_batch_size * used.gradient_accumulation_steps
    settings = {name: config.seed if name == "seed_of_the_split" else getattr(used, name) for name in names}
    settings |= {} if variant.full or variant.four_bit else {"base": "float16"}
    settings |= {"loraplus_lr_ratio": variant.loraplus} if variant.loraplus else {}
    return settings | {"effective_batch": batch}


def summarize_recipe(runs: list[dict], labels: dict[str, dict], config) -> dict:
    """Return one row of ``recipes``: settings, accuracies of validation and test over seeds, and weighted F1."""
    runs = sorted(runs, key=lambda run: run["seed"])
    variant = runs[0]["variant"]
    labels = labels[variant.changes.get("layout", config.layout)]
    predictions = {name: np.stack([run["logits"][name].argmax(-1) for run in runs]) for name in ("validation", "test")}
    right = {name: predictions[name] == labels[name] for name in predictions}
    accuracy, interval = notebook.mean_over_seeds(right["test"])
    validation, validation_interval = notebook.mean_over_seeds(right["validation"])
    return {
        "recipe": variant.name,
        "seeds": [run["seed"] for run in runs],
        "accuracy": accuracy,
        "accuracy_ci95": interval,
        "accuracies": [float(each) for each in right["test"].mean(axis=1)],
        "f1_weighted": float(np.mean([notebook.weighted_f1(labels["test"], each) for each in predictions["test"]])),
        "validation_accuracy": validation,
        "validation_accuracy_ci95": validation_interval,
        "seconds": [run["seconds"] for run in runs],
        "workers": runs[0]["workers"],
        "settings": settings_of(config, variant),
    }


def compare(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> dict:
    """Return by how many points the predictions ``first``, shape ``(seeds, reviews)``, are more accurate than ``second``, with the interval over seeds and
    reviews, and McNemar's test for each seed. ``second`` may be one seed's, for all."""
    second = np.broadcast_to(second, first.shape)
    gain, interval = notebook.mean_over_seeds(100.0 * (first == labels) - 100.0 * (second == labels))
    return {"gain": gain, "gain_ci95": interval, "mcnemar": [notebook.mcnemar(labels, *pair) for pair in zip(first, second)]}


def baseline_rows(config, layout: str, splits: datasets.DatasetDict) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Return the rows of ``recipes`` of the bags of words, fitted here, and their margins by name and split: shape ``(n,)``, above 0 for positive."""
    rows, margins = [], {}
    models, seconds = notebook.fit_baselines(splits["train"], config.seed)
    for name, model in models.items():
        row = {"recipe": name + (", published splits" if layout == "published" else ""), "seeds": [config.seed]}
        for split, prefix in (("test", ""), ("validation", "validation_")):
            margins[f"{name}/{split}"] = model.decision_function(splits[split]["text"])
            scores = notebook.score(splits[split]["label"], (margins[f"{name}/{split}"] > 0).astype(int), config.seed)
            row |= {prefix + key: scores[key] for key in ("accuracy", "accuracy_ci95", "f1_weighted")}
        rows.append(row | {"seconds": [seconds[name]], "settings": {"layout": layout}})
    return rows, margins


def baselines(config, out: Path) -> None:
    """Fit and test the bags of words on both layouts of the data set, and write ``baselines.json``."""
    rows = [row for layout, splits in both_layouts(config).items() for row in baseline_rows(config, layout, splits)[0]]
    print(*rows, sep="\n", flush=True)
    write(out, "baselines.json", config, {"recipes": rows})


def chosen_full(done: dict[str, list[dict]], labels: np.ndarray) -> str:
    """Return the name of the full fine-tuning of 256 tokens with the best mean accuracy on the validation split, of these ``labels``."""
    names = [each.name for each in all_variants() if each.full and each.name in done and not {"layout", "max_length"} & set(each.changes)]
    return max(names, key=lambda name: np.mean([(run["logits"]["validation"].argmax(-1) == labels).mean() for run in done[name]]))


def analyse(done: dict[str, list[dict]], margins: dict[str, np.ndarray], labels: dict[str, np.ndarray], token_counts: np.ndarray) -> dict:
    """Look closer at the recommended recipe on the test split: paired comparisons, calibration, accuracy by length, and the ensemble with the bag of words.

    Args:
        done: finished runs by variant, each with the same seeds; holds the road and its rivals.
        margins: of the bags of words, by name and split.
        labels: of validation and test.
        token_counts: tokens of the uncut texts of the test split.
    """
    test, recommended = labels["test"], [run["logits"] for run in sorted(done["recommended"], key=lambda run: run["seed"])]
    predictions = {name: np.stack([run["logits"]["test"].argmax(-1) for run in sorted(runs, key=lambda run: run["seed"])]) for name, runs in done.items()}
    bags = ["tfidf_logreg", "tfidf_nb_svm"]
    predictions |= {name: (margins[f"{name}/test"] > 0)[None].astype(int) for name in bags}
    names, full = [each.name for each in road()], chosen_full(done, labels["validation"])
    pairs = [*zip(names[1:], names), *(("recommended", name) for name in ("mission", full, *bags))]
    pairs += [(name, name.rpartition(", ")[0]) for name in done if ", " in name and not name.endswith("published splits")]  # one change more than
    if "recommended, 512 tokens" in done:
        others = (name for name in done if name.endswith("512 tokens") and not name.startswith("recommended"))
        pairs += [("recommended, 512 tokens", name) for name in (*others, *bags)]
    together = []
    for logits in recommended:
        stack = notebook.fit_ensemble(labels["validation"], logits["validation"], margins["tfidf_nb_svm/validation"])
        together.append(stack.predict(notebook.score_pairs(logits["test"], margins["tfidf_nb_svm/test"])))
    together = np.stack(together)
    accuracy, interval = notebook.mean_over_seeds(together == test)
    calibrations = [notebook.calibration(test, logits["test"]) for logits in recommended]
    pooled = notebook.calibration(np.tile(test, len(recommended)), np.concatenate([logits["test"] for logits in recommended]))
    compared = [name for name in ("recommended", full, "recommended, 512 tokens", "tfidf_nb_svm") if name in predictions]
    lengths = {name: notebook.accuracy_by_length(predictions[name] == test, token_counts, [128, 256, 512]) for name in compared}
    return {
        "full_finetuning": full,
        "comparisons": [{"recipe": first, "against": second} | compare(predictions[first], predictions[second], test) for first, second in pairs],
        "calibration": {"ece": float(np.mean([each["ece"] for each in calibrations])), "ece_seeds": [each["ece"] for each in calibrations], "bins": pooled["bins"]},
        "accuracy_by_length": lengths,
        "ensemble": {"accuracy": accuracy, "accuracy_ci95": interval}
        | {f"against {name}": compare(together, predictions[name], test) for name in ("recommended", "tfidf_nb_svm")},
    }


def plot_recipes(rows: list[dict], full: str, ensemble: dict) -> Figure:
    """Draw the test accuracies of the road, of its rivals and of the ensemble, with their intervals; ``full`` is the name of the full fine-tuning to show."""
    by_name = {row["recipe"]: row for row in rows} | {"recommended + tfidf_nb_svm": ensemble}
    groups = {"C1": [each.name for each in road()], "C0": [full], "0.4": ["tfidf_logreg", "tfidf_nb_svm"], "C2": ["recommended + tfidf_nb_svm"]}
    names = [(name, color) for color, group in groups.items() for name in group]
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for place, (name, color) in enumerate(names):
        value, interval = 100 * by_name[name]["accuracy"], 100 * np.array(by_name[name]["accuracy_ci95"])
        axis.errorbar(value, place, xerr=[[value - interval[0]], [interval[1] - value]], fmt="o", color=color, capsize=4)
        axis.annotate(f"{value:.1f}", (value, place), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9)
    steps = {each.name: each.name if each.name == "mission" else f"+ {each.name}" for each in road()[:-1]}
    steps |= {"recommended": "+ 5 epochs: recommended", full: "full fine-tuning"} | {name: f"bag of words, {name[6:]}" for name in groups["0.4"]}
    axis.set_yticks(range(len(names)), [steps.get(name, name) for name, _ in names])
    axis.set_ylim(len(names) - 0.4, -0.8)
    gain = 100 * (by_name["recommended"]["accuracy"] - by_name["mission"]["accuracy"])
    axis.set(xlabel="test accuracy, %, and its 95 % interval", title=f"The recipe is worth {gain:.1f} points; two classifiers together are best")
    return figure


def inference(config, splits: datasets.DatasetDict, reviews: int = 1000) -> list[dict]:
    """Return reviews per second of the recommended adapters, untrained, as they are and merged: speed does not depend on their values."""
    run = variant_config(config, road()[-1], 0)
    tokenizer = notebook.load_tokenizer(run.model_name, run.model_revision)
    _, head = inspect(run)
    encoded = notebook.encode(list(splits["test"]["text"][:reviews]), tokenizer, run.max_length, run.tail_share)
    rows = []

    def measure(name, model, **changes):
        speed = notebook.inference_speed(model, tokenizer, encoded, **changes)
        rows.append({"model": name, "device": str(model.device.type), "samples_per_second": speed})
        print(rows[-1], flush=True)

    model = notebook.build_qlora(run, head)
    measure("adapter on 4-bit", model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        merged = notebook.PeftModel.from_pretrained(notebook.load_classifier(run.model_name, 0, revision=run.model_revision), folder).merge_and_unload()
    measure("merged, fp16", merged.half())
    measure("merged, fp32", merged.float())
    measure("merged, fp32", merged.to("cpu"))
    return rows


def finished_runs(config, seeds: list[int], out: Path) -> tuple[dict[str, list[dict]], list[dict]]:
    """Return what an earlier, interrupted ``recipes`` left in ``out``: the runs by variant, those of these seeds and of today's settings, and the speeds of
    ``inference``."""
    if not (out / "recipes.json").exists():
        return {}, []
    before = json.loads((out / "recipes.json").read_text(encoding="utf-8"))
    rows = {row["recipe"]: row for row in before["recipes"]}
    done = {}
    with np.load(out / "recipes-logits.npz") as arrays:
        for variant in all_variants():
            row = rows.get(variant.name, {"seeds": None})
            if row["seeds"] == sorted(seeds) and row["settings"] == settings_of(config, variant):
                logits = [{split: arrays[f"{variant.name}/{seed}/{split}"] for split in ("validation", "test")} for seed in row["seeds"]]
                kept = {"variant": variant, "workers": row["workers"]}
                done[variant.name] = [kept | dict(zip(("seed", "seconds", "logits"), each)) for each in zip(row["seeds"], row["seconds"], logits)]
    return done, before["inference"]


def recipes(config, seeds: list[int], workers: int, out: Path) -> None:
    """Train every variant of ``all_variants`` for each seed, test it, and write ``recipes.json`` and the logits and labels, ``recipes-logits.npz``, anew after each
    variant. Where ``out`` holds them already, the variants in them are not trained again."""
    splits = both_layouts(config)
    labels = {layout: labels_of(each) for layout, each in splits.items()}
    tokenizer = notebook.load_tokenizer(config.model_name, config.model_revision)
    token_counts = notebook.count_tokens(list(splits["pooled"]["test"]["text"]), tokenizer)
    done, speeds = finished_runs(config, seeds, out)
    left = [each for each in all_variants() if each.name not in done]
    print(f"Finished before: {', '.join(done) or 'none'}. To train: {', '.join(each.name for each in left)}.", flush=True)
    speeds = speeds or inference(config, splits["pooled"])
    notebook.release_memory()
    wanted = {each.name for each in (*road(), *rivals())}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as beside:
        bags = [beside.submit(baseline_rows, config, *each) for each in splits.items()]
        for run in trained_variants(config, splits, left, seeds, workers, tested=True):
            runs = done.setdefault(run["variant"].name, [])
            runs.append(run | {"workers": workers})
            if len(runs) < len(seeds):
                continue
            whole = {name: each for name, each in done.items() if len(each) == len(seeds)}
            rows = [summarize_recipe(each, labels, config) for each in whole.values()]
            results = recipe_settings(config) | {"full_finetuning": None, "recipes": rows, "inference": speeds}
            if wanted <= set(whole):
                results |= analyse(whole, bags[0].result()[1], labels["pooled"], token_counts)
            write(out, "recipes.json", config, results)
            if wanted <= set(whole):
                bag_rows = [row for bag in bags for row in bag.result()[0]]
                notebook.save_figure(plot_recipes(rows + bag_rows, results["full_finetuning"], results["ensemble"]), str(out), "recipes.png")
            arrays = {f"{layout}/{name}": values for layout, bag in zip(labels, bags) for name, values in bag.result()[1].items()}
            arrays |= {f"labels/{layout}/{split}": values for layout, splits_of in labels.items() for split, values in splits_of.items() if split != "train"}
            arrays |= {f"{name}/{each['seed']}/{split}": each["logits"][split] for name, runs in done.items() for each in runs for split in each["logits"]}
            np.savez_compressed(out / "recipes-logits.npz", **arrays)


def mistakes(config, out: Path, seed: int = 1, n: int = 50) -> None:
    """Draw ``n`` of the test reviews that the recommended recipe, trained with ``seed``, gets wrong, by the logits that ``recipes`` left in ``out``, and
    write them to ``mistakes.txt`` to be read."""
    splits = both_layouts(config)["pooled"]
    labels = labels_of(splits)["test"]
    with np.load(out / "recipes-logits.npz") as arrays:
        sure = notebook.probabilities(arrays[f"recommended/{seed}/test"])
    wrong = np.flatnonzero(sure.argmax(-1) != labels)
    drawn = np.sort(np.random.default_rng(0).choice(wrong, n, replace=False))
    names = splits["test"].features["label"].names
    lines = [f"{index}: {names[labels[index]]}, taken for the other with {sure[index].max():.3f}\n{splits['test'][int(index)]['text']}\n" for index in drawn]
    (out / "mistakes.txt").write_text("\n".join(lines), encoding="utf-8")
    print(f"{len(wrong)} of {len(labels):,} are wrong; {n} of them are in {out / 'mistakes.txt'}.")


if __name__ == "__main__":
    commands = {"speed": speed, "memory": memory, "overview": overview, "batches": batches, "accuracy": accuracy, "embeddings": embeddings, "ranks": ranks, "short": short}
    commands |= {"baselines": baselines, "recipes": recipes, "search": search, "mistakes": mistakes}
    on_a_cpu = ("baselines", "mistakes")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(commands))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=Path("outputs") / "measured", help="folder for the results")
    arguments = parser.parse_args()
    if arguments.what not in on_a_cpu and not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed, and PyTorch finds none here.")
    quiet()
    config, _ = notebook.resolve_config(DEFAULTS | dict(os.environ), cuda=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what in ("speed", "memory", "overview", "batches", *on_a_cpu):
        commands[arguments.what](config, arguments.out)
    else:
        commands[arguments.what](config, arguments.seeds, arguments.workers, arguments.out)
