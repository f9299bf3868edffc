"""Evaluate a trained model, let it write, or chat with it.

    python eval.py runs/quickstart                           # bits per byte on the run's own held-out text
    python eval.py runs/quickstart --source my_text.txt      # ... on any source that data.source can name
    python eval.py runs/quickstart --checkpoint best --by-position --json scores.json
    python eval.py runs/quickstart --prompt "import os" "class " --samples 2 --temperature 0.8 --top-p 0.95
    python eval.py runs/quickstart --prompts prompts.txt --json answers.json
    python eval.py models/SmolLM2-135M-Instruct --chat       # a Hugging Face folder does for all of these
    python eval.py --help

Bad input is one line on stderr and exit code 2.
"""

import sys

from slm.evaluation.cli import evaluate_command

if __name__ == "__main__":
    sys.exit(evaluate_command(sys.argv[1:]))
