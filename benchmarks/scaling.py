"""What do two GPUs bring? One process a GPU, by the default recipe and by the preset `fast`.

    python -m benchmarks.scaling --processes 1 2 --model random

The effective batch is the same for all numbers of processes, so that the training is the same too. Without enough GPUs
the processes share the CPU: that shows that the code runs, and no speed.
"""

import json
import os
import subprocess
import sys
import tempfile

from benchmarks import common

METHODS = {"QLoRA default": {}, "QLoRA fast": {"preset": "fast"}}


def measure(method: str, batch: int, folder: str, length: int, steps: int, count: int) -> dict:
    """Launch `count` processes that train together, and return what the first one measured."""
    with tempfile.TemporaryDirectory() as place:
        job = {"settings": METHODS[method], "batch": batch, "folder": folder, "length": length, "steps": steps}
        job["answer"] = os.path.join(place, "answer.json")
        launch = [sys.executable, "-m"]
        if count > 1:
            launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
        environ = os.environ | {"OMP_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "false"}
        command = [*launch, "benchmarks.scaling", "--work", json.dumps(job)]
        done = subprocess.run(command, cwd=common.ROOT, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{count} processes failed: {done.stderr[-1500:]}")
        with open(job["answer"]) as file:
            return json.load(file)


def work(job: dict) -> None:
    """Train as one of the processes, and write speed and peak of one GPU to the file `job["answer"]`."""
    nb = common.notebook()
    processes = nb.PartialState(cpu=not nb.torch.cuda.is_available())
    config, task = common.settle(model_name=job["folder"], max_length=job["length"], **job["settings"])
    factor = job["batch"] // (config.per_device_train_batch_size * config.gradient_accumulation_steps)
    whole = {"per_device_train_batch_size": config.per_device_train_batch_size * factor}
    config = nb.share_batch(config.model_copy(update=whole), processes.num_processes)
    timer, on_gpu = nb.StepTimer(6), nb.torch.cuda.is_available()
    once = {"num_train_epochs": 1, "train_sampling_strategy": "random"} | nb.QUIET
    arguments = nb.training_arguments(config, nb.Path(config.output_dir), **once)
    texts = common.random_texts(job["batch"] * (timer.warmup + job["steps"]), job["length"])
    model = nb.build_qlora(config, task)
    trainer = nb.make_trainer(model, config, arguments, task.tokenizer, texts, callbacks=[timer])
    trainer.train()
    row = {"samples_per_second": job["steps"] * job["batch"] / timer.seconds}
    row |= {"captured": trainer.steps["captured"] / trainer.steps["all"]}
    row["peak_mb"] = nb.torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None
    row["micro_batch"] = [config.per_device_train_batch_size, config.gradient_accumulation_steps]
    if processes.is_main_process:
        nb.atomic_write(nb.Path(job["answer"]), json.dumps(row))
    if processes.num_processes > 1:
        processes.wait_for_everyone()
        nb.torch.distributed.destroy_process_group()


def main() -> None:
    made = common.parser("scaling", __doc__)
    made.add_argument("--model", nargs="+", default=["random"], help="random, base, small, a Hub id or a folder")
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    made.add_argument(
        "--batches", type=int, nargs="+", default=[32, 64], help="texts per step, of all processes together"
    )
    made.add_argument("--length", type=int, default=256, help="tokens of a text")
    made.add_argument("--steps", type=int, default=40, help="timed steps")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--work", default="", help="for the processes that this launches")
    arguments = made.parse_args()
    if arguments.work:
        return work(json.loads(arguments.work))
    names = ("batches", "length", "steps", "rounds", "tiny")
    study = common.Study("scaling", arguments, {name: getattr(arguments, name) for name in names})
    for model in arguments.model:
        folder = common.model_folder(model, arguments.tiny)
        for turn in range(arguments.rounds):
            for method in [*METHODS][: 1 if arguments.tiny else None]:
                for batch in arguments.batches:
                    for count in arguments.processes:
                        key = {"model": common.public(folder), "method": method, "batch": batch, "processes": count}
                        given = (method, batch, folder, arguments.length, arguments.steps, count)
                        study.add(key | {"round": turn}, lambda g=given: measure(*g))


if __name__ == "__main__":
    main()
