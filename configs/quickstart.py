"""A 2.2 M-parameter model of Python and its documentation, from text that every Python installation carries.

Command:   make quickstart        (or: python train.py configs/quickstart.py)
Hardware:  2 CPU cores
Time:      about 3.5 minutes, compilation and the tokenizer's training included
Expected:  1.68 ± 0.04 bits a byte on all 32 held-out documents (CPython 3.11)
"""

import slm

config = slm.Experiment(
    name="quickstart",
    model=slm.ModelConfig(layers=4, width=192, heads=3, mlp_width=512),
    data=slm.DataConfig(source=("cpython",), tokenizer="bpe:2048", sequence_length=256),
    # Muon learns most from few tokens (Jordan et al. 2024); the schedule decays to zero (Defazio et al. 2023).
    optim=slm.OptimConfig(name="muon", learning_rate=5e-3, schedule="linear", warmup_steps=20, final_ratio=0.0),
    train=slm.TrainConfig(steps=500, batch_size=8, evaluate_every=100),
    checkpoint=slm.CheckpointConfig(every=100),
)
