"""How fast and how large is a training step, with every method treated alike?

    python -m benchmarks.speed --model random base

Each method trains on texts of the full length, `--rounds` times in turn with the others; the speed is the median.
`eager` launches every kernel from Python, `captured` replays CUDA graphs.
"""

import functools
import time
from statistics import median

from benchmarks import common

FULL = {"optim": "adamw_torch_fused", "gradient_checkpointing": False}
EAGER, WHOLE = {"cuda_graphs": False}, {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
CHECKPOINTED = {"gradient_checkpointing": True}


def methods() -> dict[str, tuple[str, bool, dict]]:
    """Return by name: the dtype of the base, whether with adapters, and the settings."""
    table = {}
    for name, base, adapters in (("full fp16", "float32", False), ("LoRA fp16", "float16", True)):
        for launch, graphs in (("eager", EAGER), ("captured", {})):
            for batch, whole in (("16 x 2", {}), ("32 x 1", WHOLE)):
                for kept, again in (("", {}), (", checkpointed", CHECKPOINTED)):
                    table[f"{name}, {launch}, {batch}{kept}"] = (base, adapters, FULL | graphs | whole | again)
    for name, preset in (("default", ""), ("fast", "fast"), ("lean", "lean")):
        table[f"QLoRA {name}, eager"] = ("4-bit", True, {"preset": preset} | EAGER)
        table[f"QLoRA {name}, captured"] = ("4-bit", True, {"preset": preset})
    return table


def measure(name: str, folder: str, length: int, steps: int) -> dict:
    """Return what a method costs: speed, peak, trained parameters, MB of weights, seconds before the timed steps."""
    nb, (base, adapters, settings) = common.notebook(), methods()[name]
    config, task = common.settle(model_name=folder, max_length=length, efficiency_steps=steps, **settings)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    start = time.perf_counter()
    build = functools.partial(common.build, base, adapters)
    texts = common.random_texts(batch, length)
    row = nb.measure_method(name, build, config, task.names, task.head, task.tokenizer, texts)
    timed = steps * batch / row["samples_per_second"] if row["measured"] else None
    return row | {"startup_seconds": timed and time.perf_counter() - start - timed}


def floors(folder: str, length: int) -> dict:
    """Return reviews per second of the preset `fast` if the GPU did nothing but its matrix products (at the rate
    measured here), or nothing but read and write what a step keeps (weights twice, activations once each way)."""
    from torch.utils.benchmark import Timer
    from torch.utils.flop_counter import FlopCounterMode

    nb = common.notebook()
    torch = nb.torch
    config, task = common.settle(model_name=folder, max_length=length, preset="fast")
    device, dtype = ("cuda", torch.float16) if nb.torch.cuda.is_available() else ("cpu", torch.float32)
    n = 8192 if device == "cuda" else 256
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = Timer("a @ a", globals={"a": a}).blocked_autorange(min_run_time=0.5).median
    copy = Timer("a.clone()", globals={"a": a}).blocked_autorange(min_run_time=0.5).median
    plain, _ = nb.load_classifier(config, task.names)
    plain = nb.get_peft_model(plain, nb.lora_config(config, task.head)).to("meta").train()
    ids = torch.ones((32, length), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        plain(input_ids=ids, labels=ids[:, 0]).loss.backward()
    model, kept = nb.build_qlora(config, task.names, task.head).train(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        texts = {"input_ids": ids.new_full((4, length), 1000, device=device)}
        model(**texts, labels=texts["input_ids"].new_zeros(4))
    weights = {each.data_ptr() for each in model.parameters()}
    activations = 8 * sum(each.nbytes for place, each in kept.items() if place not in weights)  # of 4 texts; 32
    moved = 2 * activations + 2e6 * float(nb.storage(model).loc["all", "MB"])
    rate, bandwidth = 2 * n**3 / seconds, 2 * a.nbytes / copy
    parts = {"matrix_tflops": rate / 1e12, "tflop_per_step": counter.get_total_flops() / 1e12}
    parts |= {"bandwidth_gb_s": bandwidth / 1e9, "moved_gb_per_step": moved / 1e9}
    return parts | {
        "arithmetic_samples_per_second": 32 * rate / counter.get_total_flops(),
        "bytes_samples_per_second": 32 * bandwidth / moved,
    }


GROUPS = {  # of kernels, by a part of their names; the first that fits
    "4-bit expansion": "dequant",
    "attention": "flash|fmha|attention|sdpa|softmax",
    "matrix products": "gemm|cutlass|nvjet|xmma|cublas",
    "norms": "layer_norm|layernorm|rms_norm|GammaBeta",
    "dropout": "dropout|philox|bernoulli",
    "GELU": "gelu",
    "optimizer": "multi_tensor|adam|optimizer|kOptimizer",
    "additions, casts, scaling": "add|mul|copy|cast|elementwise|fill|reduce|cat|embedding|index",
}


def kernels(folder: str, length: int, steps: int) -> dict[str, float]:
    """Return the GPU milliseconds of a captured step of `fast`, by group of kernels; empty without a GPU."""
    import re

    nb = common.notebook()
    if not nb.torch.cuda.is_available():
        return {}
    config, task = common.settle(model_name=folder, max_length=length, preset="fast")
    profiler = nb.torch.profiler.profile(activities=[nb.torch.profiler.ProfilerActivity.CUDA])

    class Profile(nb.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                profiler.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                nb.torch.cuda.synchronize()
                profiler.stop()

    once = config.model_copy(update={"num_train_epochs": 1, "train_sampling_strategy": "random"})
    arguments = nb.brief_arguments(once, config.output_dir)
    texts = common.random_texts(32 * (6 + steps), length)
    model = nb.build_qlora(config, task.names, task.head)
    trainer = nb.make_trainer(model, config, arguments, task.tokenizer, texts, callbacks=[Profile()])
    trainer.remove_callback(nb.PrinterCallback)
    trainer.train()
    totals = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in profiler.key_averages():
        fits = (group for group, words in GROUPS.items() if re.search(words, event.key, re.IGNORECASE))
        totals[next(fits, "other")] += event.self_device_time_total / 1e3 / steps
    return totals


def summarize(rows: list[dict]) -> list[dict]:
    """Return a row for each method: medians over the rounds."""
    merged = []
    for name in dict.fromkeys(row["method"] for row in rows):
        same = [row for row in rows if row["method"] == name]
        speeds = [row["samples_per_second"] for row in same if row["measured"]]
        row = {name: value for name, value in same[0].items() if name != "round"}
        for figure in ("samples_per_second", "peak_mb", "startup_seconds"):
            known = [row[figure] for row in same if row.get(figure) is not None]
            row[figure] = median(known) if known else None
        merged.append(row | {"rounds": speeds, "measured": bool(speeds)})
    return merged


def ratios(rows: list[dict], floor: dict) -> dict[str, float | None]:
    """Return the comparisons that matter, from `summarize`'s rows; None where a method was not measured."""
    found = {row["method"]: row for row in rows}
    full, checkpointed = "full fp16, captured, 32 x 1", "full fp16, captured, 16 x 2, checkpointed"

    def over(first: str, second: str, column: str = "samples_per_second"):
        pair = [found.get(name, {}).get(column) for name in (first, second)]
        return pair[0] / pair[1] if all(pair) else None

    speed = found.get("QLoRA fast, captured", {}).get("samples_per_second")
    return {
        "default_captured_over_eager": over("QLoRA default, captured", "QLoRA default, eager"),
        "fast_over_full_captured": over("QLoRA fast, captured", full),
        "fast_peak_over_full_captured": over("QLoRA fast, captured", full, "peak_mb"),
        "lean_over_full_captured_checkpointed": over("QLoRA lean, captured", checkpointed),
        "lean_peak_mb": found.get("QLoRA lean, captured", {}).get("peak_mb"),
        "fast_share_of_floor": speed and speed / floor["arithmetic_samples_per_second"],
    }


def main() -> None:
    made = common.parser("speed", __doc__)
    made.add_argument(
        "--model", nargs="+", default=["random", "base"], help="random, base, small, a Hub id or a folder"
    )
    made.add_argument("--length", type=int, default=256, help="tokens of a text")
    made.add_argument("--steps", type=int, default=40, help="timed steps of 32 texts")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--methods", default="", help="measure only those whose names hold this text")
    arguments = made.parse_args()
    settings = {name: getattr(arguments, name) for name in ("length", "steps", "rounds", "tiny")}
    study, models = common.Study("speed", arguments, settings), {}
    for model in arguments.model:
        folder = common.model_folder(model, arguments.tiny)
        name = common.public(folder)
        chosen = [each for each in methods() if arguments.methods in each]
        measure(next(iter(chosen)), folder, arguments.length, 1)  # the first model on a GPU is slow
        for turn in range(arguments.rounds):
            for method in chosen:
                key = {"model": name, "method": method, "round": turn}
                study.add(key, lambda m=method, f=folder: measure(m, f, arguments.length, arguments.steps))
        once = {"model": name, "method": "floors"}
        floor = study.add(once, lambda f=folder: floors(f, arguments.length) | {"measured": False})
        once = {"model": name, "method": "kernels"}
        milliseconds = study.add(once, lambda f=folder: {"ms": kernels(f, arguments.length, 10), "measured": False})
        rows = [row for row in study.runs if row["model"] == name and "round" in row]
        merged = summarize(rows)
        models[name] = {
            "methods": merged,
            "ratios": ratios(merged, floor),
            "floors": floor,
            "kernels": milliseconds["ms"],
        }
        study.write(models=models)
        print(models[name]["ratios"], flush=True)


if __name__ == "__main__":
    main()
