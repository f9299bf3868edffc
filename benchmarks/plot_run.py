"""Draw a run's training curve.

python benchmarks/plot_run.py runs/quickstart docs/quickstart.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by colour-blind readers, and in print


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    rows = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    scored = [row for row in rows if "validation_bits_per_byte" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], color=BLUE, lw=1, label="training batch")
    left.plot([r["tokens"] for r in scored], [r["validation_loss"] for r in scored], "o-", color=ORANGE, ms=4,
              label="held-out documents")  # fmt: skip
    left.set(xlabel="training tokens", ylabel="loss, nats a token")
    left.legend(frameon=False)
    right.errorbar([r["tokens"] for r in scored], [r["validation_bits_per_byte"] for r in scored],
                   yerr=[r["validation_bits_per_byte_stderr"] for r in scored], fmt="o-", color=ORANGE, ms=4,
                   capsize=3)  # fmt: skip
    right.set(xlabel="training tokens", ylabel="held-out bits a byte (± s.e.)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
