"""The section of the report on a T4: arithmetic and a public run, no run of ours."""

from benchmarks import statistics
from benchmarks.words import join

T4 = """We have not used a T4. It has 320 GB/s of memory bandwidth and 65 TFLOP/s in
fp16, an H200 4,800 GB/s and 990 TFLOP/s: about 15 times as much (the vendor's
figures)."""
PUBLIC_RUN = """A comparable public run, not ours: QLoRA of bert-base on 20,000 texts of
128 tokens, 2 epochs, eager, without autocast, took 7 min 33 s on a T4, 88 texts/s; full
fine-tuning in fp32 took 14 min 35 s. Its log shows that QLoRA was checkpointed
([KyriakosTop](https://github.com/KyriakosTop/bert-distilbert-compression))."""


def section(runs):
    """Return the section on a T4: arithmetic from the speeds of bert-base's shape."""
    rows = statistics.medians([run for run in runs if run["model"] == "random"])
    speeds = {}
    for launch in ("captured", "eager"):
        row = rows.get(f"QLoRA default, {launch}", {})
        speeds[launch] = row.get("samples_per_second")
    if not speeds["captured"] or not speeds["eager"]:
        return ""
    work = 16 / speeds["captured"]  # seconds of a micro-batch
    launching = 16 / speeds["eager"]
    minutes = 3 * 16_000 / 16 * 15 * work / 60
    arithmetic = (
        "A micro-batch of the default, 16 texts of 256 tokens, takes"
        f" {1000 * work:.0f} ms captured on the GPU of the table above. A T4, equally"
        f" well used, would need about {15_000 * work:.0f} ms, and {minutes:.0f}"
        " minutes for 3 epochs of 16,000 texts. Eager launching takes this host"
        f" {1000 * launching:.0f} ms. With an equally fast host, a T4 would probably"
        " be limited by its own work, and CUDA graphs may not help there."
    )
    return join(["## What would a T4 do?", f"{T4} {arithmetic}", PUBLIC_RUN])
