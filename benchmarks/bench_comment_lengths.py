"""One step of tuning on 8 comments of 25, 75, 150 and 256 tokens: CPU seconds, and the peak memory of its process.

Beside it the model's own forward on padded rows, in the same precision and with the same adapter. Every figure comes
from a process of its own, which loads the model and takes the step three times, with one thread.

    python benchmarks/bench_comment_lengths.py
"""

import json
import resource
import subprocess
import sys
import time

import torch

from benchmarks.measure import report
from point_in_space_sim.engine import fine_tuning
from point_in_space_sim.engine.base_model import load_base_model
from point_in_space_sim.engine.fine_tuning import encode_comment, tune
from point_in_space_sim.engine.settings import TuningSettings

LENGTHS = (25, 75, 150, 256)
STEPS = 3


def measure(length: int, *, padded: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    base = load_base_model()
    if padded:
        fine_tuning.frozen_activations = lambda *_: None  # without them `tune` takes the model's own forward
    comments = [" ".join([f"word {i}", *["again"] * (length - 1)]) for i in range(8)]
    comments = [base.tokenizer.decode(encode_comment(base, text)[: length - 1]) for text in comments]
    assert {len(encode_comment(base, text)) for text in comments} == {length}
    settings = TuningSettings(epochs=STEPS)
    tune(base, comments[:1], TuningSettings(epochs=1), 0)
    loaded = time.process_time()
    tune(base, comments, settings, 0)
    return {
        "seconds": (time.process_time() - loaded) / STEPS,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    for length in LENGTHS:
        ours, padded = (
            json.loads(
                subprocess.run([sys.executable, __file__, str(length), way], check=True, stdout=subprocess.PIPE).stdout
            )
            for way in ("packed", "padded")
        )
        report(f"{length} tokens: CPU", ours["seconds"], "s a step", "-", padded["seconds"], "padded rows")
        bar = "2500" if length == max(LENGTHS) else "-"
        report(f"{length} tokens: peak memory", ours["memory"], "MB", bar, padded["memory"], "padded rows")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(int(sys.argv[1]), padded=sys.argv[2] == "padded")))
    else:
        main()
