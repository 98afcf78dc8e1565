"""Measure the notebook's training on one GPU and on several of one machine, one process a GPU: speed, memory, communication, accuracy.

    python scripts/measure_scaling.py                         on 1 and 2 GPUs, seeds 1, 2 and 3
    python scripts/measure_scaling.py --gpus 1 2 4 --seeds 1
    python scripts/measure_scaling.py --cpu --steps 2         the same code on CPU processes: a rehearsal, its figures mean nothing

Settings come from the environment as in the notebook (QLORA_MODEL_NAME, QLORA_DATASET_NAME, ...), beside the full profile. Speed is measured with
that model and with bert-base by shape (random weights), in fast and plain execution, at the effective batch of the settings and at twice it,
on the longest reviews. Accuracy is that of the whole training, on the test split, for each seed.
Results go to scaling.json, written anew after every part.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked later

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from measure import DEFAULTS, inspect, load_data, notebook, provenance, quiet
from transformers import BertConfig, BertModel

SHAPES = "bert-base shapes, random weights"


def write(out: Path, results: dict) -> None:
    """Write ``scaling.json``."""
    notebook.write_whole(out / "scaling.json", json.dumps(results, indent=2) + "\n")


def read(out: Path) -> dict:
    """Return what ``scaling.json`` holds."""
    return json.loads((out / "scaling.json").read_text(encoding="utf-8"))


def add_row(out: Path, row: dict) -> None:
    """Add ``row`` to ``scaling.json``, or what it has to a row of the same run."""
    results = read(out)
    names = ("model", "execution", "gpus", "effective_batch")
    same = [each for each in results["scaling"] if all(each[name] == row[name] for name in names)]
    if same:
        same[0].update(row)
    else:
        results["scaling"].append(row)
    write(out, results)
    print(row, flush=True)


class Blocks(notebook.TrainerCallback):
    """Time blocks of ``steps`` steps after ``warmup``: with and without communication in turn, where there are several processes, so that both meet the same conditions. ``seconds`` holds them; a last block is profiled."""

    def __init__(self, warmup: int, steps: int, rounds: int, processes: PartialState):
        self.warmup, self.steps, self.processes = warmup, steps, processes
        self.kinds = rounds * (["with", "without"] if processes.num_processes > 1 else ["with"])
        if processes.num_processes > 1 and torch.cuda.is_available():
            self.kinds.append("profiled")
        self.total = warmup + steps * len(self.kinds)
        self.seconds = {kind: [] for kind in self.kinds}
        self.trainer = self.profiler = self.started = None
        self.kernels = {}

    def communicate(self, on: bool) -> None:
        """Let the processes average their gradients, or not."""
        if isinstance(self.trainer, notebook.GraphTrainer):
            vars(self.trainer).pop("average_gradients", None)
            if not on:
                self.trainer.average_gradients = lambda: None
        elif self.processes.num_processes > 1:
            self.trainer.model_wrapped.require_backward_grad_sync = on

    def now(self) -> float:
        """Return the time when all processes have finished what they launched."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.processes.wait_for_everyone()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        block, inside = divmod(state.global_step - self.warmup, self.steps)
        if inside or not 0 <= block < len(self.kinds):
            return
        self.communicate(self.kinds[block] != "without")
        if self.kinds[block] == "profiled":
            self.start_profiler()
        self.started = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        done, rest = divmod(state.global_step - self.warmup, self.steps)
        if rest or not 0 < done <= len(self.kinds):
            return
        kind = self.kinds[done - 1]
        self.seconds[kind].append(self.now() - self.started)
        if kind == "profiled" and self.profiler is not None:
            self.profiler.stop()
            events = [(event.key, event.self_device_time_total / 1e6) for event in self.profiler.key_averages()]
            self.kernels = {"nccl": sum(each for name, each in events if "nccl" in name.lower()), "all": sum(each for _, each in events)}

    def start_profiler(self) -> None:
        """Start PyTorch's profiler; where it does not work, say so and go on without."""
        try:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
        except Exception as error:  # the figure from blocks with and without communication needs no profiler
            print(f"No profile: {type(error).__name__}: {error}", flush=True)
            self.profiler = None


def peak_mb(counter, processes: PartialState) -> float | None:
    """Return the largest peak of a process, in MB; None without a GPU."""
    peak = max(counter.passes, counter.update, counter.peak())
    return max(gather_object([peak])) / 1e6 if torch.cuda.is_available() else None


def all_reduce_ms(values: int, processes: PartialState, repeats: int = 100) -> float | None:
    """Return the milliseconds that adding up ``values`` float32 numbers over all processes takes."""
    if processes.num_processes == 1:
        return None
    numbers = torch.zeros(values, device=processes.device)
    for repeat in range(repeats + 10):
        if repeat == 10:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
        torch.distributed.all_reduce(numbers)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / repeats


def measure_speed(config, steps: int, rounds: int, tokenizer, train, processes: PartialState) -> dict:
    """Train ``config``, as one process does it, on the longest texts of ``train``; return samples per second, peak memory a GPU, and how much of a step is communication."""
    _, head = inspect(config)
    notebook.release_memory()
    model = notebook.build_qlora(config, head)
    counter, blocks = notebook.MemoryCounter(4), Blocks(4, steps, rounds, processes)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes.num_processes
    longest = np.argsort([-len(ids) for ids in train["input_ids"]], kind="stable")
    rows = train.select(np.resize(longest, batch * blocks.total))
    arguments = notebook.short_run(config, "scaling", num_train_epochs=1, train_sampling_strategy="random")
    blocks.trainer = notebook.make_trainer(model, arguments, tokenizer, rows, callbacks=[counter, blocks], execution=config.execution)
    blocks.trainer.train()
    seconds = {kind: float(np.median(each)) for kind, each in blocks.seconds.items()}
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    row = {
        "samples_per_second": steps * batch / seconds["with"],
        "peak_mb": peak_mb(counter, processes),
        "recorded": getattr(blocks.trainer, "records", False),
        "trainable_parameters": trained,
        "step_ms": 1000 * seconds["with"] / steps,
        "blocks_ms": {kind: [1000 * each / steps for each in times] for kind, times in blocks.seconds.items()},
    }
    if processes.num_processes > 1:
        row |= {"communication_share": 1 - seconds["without"] / seconds["with"], "all_reduce_ms": all_reduce_ms(trained, processes)}
    if blocks.kernels:
        row |= {"nccl_kernels_ms": 1000 * blocks.kernels["nccl"] / steps, "all_kernels_ms": 1000 * blocks.kernels["all"] / steps}
    return row


def train_and_test(config, tokenizer, tokenized) -> tuple[dict, np.ndarray]:
    """Train the recipe of ``config`` and test it, by all processes together; return what came of it, and which test reviews are right."""
    _, head = inspect(config)
    notebook.release_memory()
    model = notebook.build_qlora(config, head)
    folder = broadcast_object_list([tempfile.mkdtemp()])[0]  # one for all: the best checkpoint is read by all
    arguments = notebook.training_arguments(config, folder, disable_tqdm=True, save_only_model=True)
    stop = notebook.EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience)
    data = tokenized["train"], tokenized["validation"]
    trainer = notebook.make_trainer(model, arguments, tokenizer, *data, callbacks=[stop], execution=config.execution)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    answers = trainer.predict(tokenized["test"])
    right = answers.predictions.argmax(-1) == answers.label_ids
    record = {"seed": config.seed, "seconds": seconds, "epochs": trainer.state.epoch, "validation_accuracy": trainer.state.best_metric, "accuracy": float(right.mean())}
    return record, right


def compare(out: Path) -> dict:
    """Return how much more accurate several GPUs are than one, in points, with the interval over seeds and reviews."""
    files = {int(path.stem.rpartition("-")[2]): np.load(path)["right"] for path in out.glob("scaling-right-*.npz")}
    return {
        f"{gpus} against 1": dict(zip(("gain", "gain_ci95"), notebook.mean_over_seeds(100.0 * right - 100.0 * files[1])))
        for gpus, right in sorted(files.items())
        if gpus > 1 and 1 in files and len(right) == len(files[1])
    }


def tiny_or_base(folder: str, tokenizer, cpu: bool) -> str:
    """Write a BERT with random weights to ``folder``: bert-base by shape, or for a rehearsal on a CPU a tiny one."""
    torch.manual_seed(0)
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    BertModel(BertConfig(**tiny if cpu else {})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def work(arguments: argparse.Namespace) -> None:
    """Measure everything as one of the processes that were launched together."""
    processes = PartialState(cpu=arguments.cpu)
    count = processes.num_processes
    first = processes.is_main_process
    if not first:
        sys.stdout = open(os.devnull, "w")
    quiet()
    config, _ = notebook.resolve_config(DEFAULTS | dict(os.environ), cuda=not arguments.cpu)
    tokenizer = notebook.load_tokenizer(config.model_name)
    tokenized = datasets.load_from_disk(str(arguments.data))
    begun = time.monotonic()

    def row_of(name, run, batch):
        return {"model": name, "execution": run.execution, "gpus": count, "effective_batch": batch}

    def carried(config):
        return notebook.carried_out(notebook.share_batch(config, count))

    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    records, rights = [], []
    for seed in arguments.seeds:
        run = carried(dataclasses.replace(config, seed=seed))
        record, right = train_and_test(run, tokenizer, tokenized)
        records.append(record)
        rights.append(right)
        if first:
            accuracy, interval = notebook.mean_over_seeds(np.stack(rights))
            row = row_of(Path(config.model_name).name, run, effective)
            add_row(arguments.out, row | {"accuracy": accuracy, "accuracy_ci95": interval, "runs": records})
            np.savez_compressed(arguments.out / f"scaling-right-{count}.npz", right=np.stack(rights))
    folder = broadcast_object_list([tempfile.mkdtemp()])[0]
    if first:
        tiny_or_base(folder, tokenizer, arguments.cpu)
    processes.wait_for_everyone()
    for execution in ("fast", "plain"):
        for name, model in ((Path(config.model_name).name, config.model_name), (SHAPES, folder)):
            for factor in (1, 2):
                size = config.per_device_train_batch_size * factor
                changes = {"model_name": model, "execution": execution, "per_device_train_batch_size": size}
                run = carried(dataclasses.replace(config, **changes))
                steps = arguments.steps if execution == "fast" else max(2, arguments.steps // 4)
                row = row_of(name, run, effective * factor) | measure_speed(run, steps, arguments.rounds, tokenizer, tokenized["train"], processes)
                if first:
                    add_row(arguments.out, row)
    if first:
        print(f"{count} process(es): {time.monotonic() - begun:.0f} s, without reading the data.", flush=True)
    notebook.go_on_alone(processes)


def launch(arguments: argparse.Namespace) -> None:
    """Start the processes for each number of GPUs, and gather what they measured."""
    quiet()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.out.glob("scaling-right-*.npz"):
        path.unlink()
    config, _ = notebook.resolve_config(DEFAULTS | dict(os.environ), cuda=not arguments.cpu)
    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    settings = {"effective_batch": effective, "max_length": config.max_length, "epochs": config.num_train_epochs}
    write(arguments.out, settings | {"accuracy_difference": {}, "scaling": []})
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        load_data(config)[-1].save_to_disk(folder)
        for count in arguments.gpus:
            own = [__file__, "--worker", "--data", folder, "--out", str(arguments.out), "--steps", str(arguments.steps), "--rounds", str(arguments.rounds)]
            own += ["--seeds", *map(str, arguments.seeds), *(["--cpu"] if arguments.cpu else [])]
            several = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            start = time.monotonic()
            done = subprocess.run([sys.executable, *(several if count > 1 else []), *own])
            failed += [count] if done.returncode else []
            print(f"{count} process(es), with their start: {time.monotonic() - start:.0f} s, status {done.returncode}.", flush=True)
            write(arguments.out, read(arguments.out) | {"accuracy_difference": compare(arguments.out)})
    write(arguments.out, provenance(config) | read(arguments.out))
    print(json.dumps(read(arguments.out)["accuracy_difference"]), flush=True)
    if failed:
        sys.exit(f"Not all was measured: the processes on {' and on '.join(map(str, failed))} GPUs failed.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of GPUs, one process on each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps in a timed block of fast execution")
    parser.add_argument("--rounds", type=int, default=3, help="timed blocks with, and as many without communication")
    parser.add_argument("--cpu", action="store_true", help="rehearse on CPU processes")
    parser.add_argument("--out", type=Path, default=Path("outputs") / "measured", help="folder for the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.cpu and not arguments.worker and torch.cuda.device_count() < max(arguments.gpus):
        parser.error(f"{max(arguments.gpus)} CUDA GPUs are needed, and PyTorch finds {torch.cuda.device_count()} here; --cpu rehearses without.")
    (work if arguments.worker else launch)(arguments)
