"""Train a language model.

    python train.py configs/quickstart.py
    python train.py configs/quickstart.py --optim.learning-rate 1e-3 --model.attention window softmax --name narrow
    python train.py configs/slm_1b.py --dry-run --devices 8 --mesh.fsdp 8    # trains nothing: prints memory
    python train.py configs/NAME.py --help    # every field, with its meaning

Run the same command again to resume an interrupted run. Ctrl-C or SIGTERM saves first and exits with 0; bad input is
one line on stderr and exit code 2.
"""

import sys

from slm.cli import train_command

if __name__ == "__main__":
    sys.exit(train_command(sys.argv[1:]))
