"""What studies vary: a quarter of a million parameters, small enough for many arms and seeds on a laptop.

Command:   python train.py configs/tiny.py
           python train.py configs/tiny.py --sweep "model.attention=softmax,gla optim.name=adamw,muon" --seeds 3
Hardware:  2 CPU cores
Time:      about a minute for each run
Expected:  2.45 ± 0.11 bits a byte over four seeds (benchmarks/studies.py)
"""

import slm

config = slm.Experiment(
    name="tiny",
    model=slm.ModelConfig(layers=4, width=64, heads=2, mlp_width=192),
    data=slm.DataConfig(source=("cpython",), tokenizer="bpe:512", sequence_length=128),
    optim=slm.OptimConfig(learning_rate=4e-3, warmup_steps=30, schedule="linear", final_ratio=0.0),
    train=slm.TrainConfig(steps=300, batch_size=16, evaluate_every=100, evaluate_sequences=256, log_every=20),
    checkpoint=slm.CheckpointConfig(every=150, keep=1),
)
