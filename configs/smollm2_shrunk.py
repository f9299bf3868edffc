"""SmolLM2-135M cut to two thirds, taught by the whole: the first link of shrink, distil, quantize, ship.

Command:   python train.py configs/smollm2_shrunk.py --data.source TEXT_FOLDER
           (models/SmolLM2-135M: a Hugging Face folder or a .gguf file, --model.init_from and --distill.teacher)
           small scale, 2 CPU cores: --data.sequence-length 256 --train.batch-size 2 --train.accumulation 1
           --train.steps 40 --optim.warmup-steps 5 --train.precision float32
Hardware:  one GPU
Time:      not yet run on one; small scale: 6 minutes
Expected:  not yet run on one; small scale: perplexity 109.3 to 42.1, of the whole 34.5 (benchmarks/README.md)
Then:      configs/smollm2_int4.py

Choices: feed-forward channels of large activations and the layers that change their input most are kept (Minitron,
Muralidharan et al. 2024; ShortGPT, Men et al. 2024): width of feed-forwards before depth, and no more than a third at
once. Forward KL to the model that it was cut from, at temperature 1, almost alone (alpha 0.9); a fifth of the learning
rate of pre-training.
"""

import slm

WHOLE = "models/SmolLM2-135M"

config = slm.Experiment(
    name="smollm2_shrunk",
    model=slm.ModelConfig(init_from=WHOLE),
    shrink=slm.ShrinkConfig(mlp_width=1024, layers=26),
    distill=slm.DistillConfig(teacher=WHOLE, alpha=0.9),
    data=slm.DataConfig(source=("data/text",), sequence_length=1024),
    optim=slm.OptimConfig(learning_rate=6e-4, warmup_steps=50, weight_decay=0.0, final_ratio=0.0),
    train=slm.TrainConfig(steps=5000, batch_size=64, accumulation=4, precision="bfloat16", evaluate_every=500),
    checkpoint=slm.CheckpointConfig(every=500),
)
