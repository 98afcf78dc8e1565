"""Where is QLoRA needed? The peak of each method, for encoders of four sizes.

The weights are random and have the shapes of real models. Each method trains on steps
of 16 x 2 texts of 256 tokens. The peak includes loading the model.
"""

from dataclasses import dataclass

import torch

from benchmarks import common


@dataclass(frozen=True)
class Shape:
    """A model's shape: its family, and what it has otherwise than by default."""

    name: str
    family: str
    changes: dict


SHAPES = [
    Shape("bert-base", "bert", {}),
    Shape(
        "bert-large",
        "bert",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    Shape(
        "xlm-roberta-large",
        "xlm-roberta",
        {
            "vocab_size": 250_002,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
    ),
    Shape(
        "xlm-roberta-xl",
        "xlm-roberta-xl",
        {
            "vocab_size": 250_880,
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 10_240,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
    ),
]


@dataclass(frozen=True)
class Method:
    """A way to train, and what it sets."""

    name: str
    build: object
    settings: dict


METHODS = [
    Method(
        "full fine-tuning",
        common.build_full,
        {
            "gradient_checkpointing": False,
            "optim": "adamw_torch_fused",
        },
    ),
    Method(
        "full fine-tuning, checkpointed, 8-bit AdamW",
        common.build_full,
        {
            "gradient_checkpointing": True,
            "optim": "adamw_8bit",  # not paged, so the allocator counts it
        },
    ),
    Method("LoRA, 16-bit base, checkpointed", common.build_lora, {"preset": "lean"}),
    Method("QLoRA, default", common.build_qlora, {}),
    Method("QLoRA, lean", common.build_qlora, {"preset": "lean"}),
]


def outside_the_allocator():
    """Return the MB that CUDA and its libraries hold beside PyTorch's allocator."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / 1e6


def measure(method, folder, length, steps):
    """Return what a method costs, as the notebook's section 10 measures it."""
    settings = {"max_length": length, "efficiency_steps": steps}
    settings.update(method.settings)
    task = common.settle(folder, settings)
    nb = common.notebook()
    row = nb.measure_method(
        method.name,
        method.build,
        task.config,
        task.names,
        task.head,
        task.tokenizer,
        common.random_texts(32, length),
    )
    nb.free_memory()
    row["outside_the_allocator_mb"] = outside_the_allocator()
    return row


def main():
    made = common.parser("memory", __doc__)
    names = [shape.name for shape in SHAPES]
    made.add_argument(
        "--models", nargs="+", default=names, help="of " + ", ".join(names)
    )
    made.add_argument("--length", type=int, default=256, help="tokens of a text")
    made.add_argument("--steps", type=int, default=5, help="timed steps")
    arguments = made.parse_args()
    settings = {
        "length": arguments.length,
        "steps": arguments.steps,
        "tiny": arguments.tiny,
    }
    study = common.Study("memory", arguments.out, settings)
    warm = common.random_model(common.TINY)
    measure(METHODS[0], warm, arguments.length, 1)  # a GPU's first model is slow
    for shape in SHAPES:
        if shape.name not in arguments.models:
            continue
        if arguments.tiny:
            folder = warm
        else:
            folder = common.random_model(shape.changes, shape.family)
        for method in METHODS:
            key = {"model": shape.name, "method": method.name}
            study.add(key, measure, method, folder, arguments.length, arguments.steps)


if __name__ == "__main__":
    main()
