"""1.07 B parameters, shaped like Llama 3.2 1B with a smaller vocabulary.

Command:   python train.py configs/slm_1b.py --data.source TEXT_FOLDER --mesh.fsdp 16
           python train.py configs/slm_1b.py --dry-run --devices 16 --mesh.fsdp 16
Hardware:  sixteen GPUs or a TPU slice of sixteen chips, several processes (see the README)
Time:      not yet run
Expected:  not yet run

Choices: as configs/slm_360m.py; 16 layers of width 2048 with 32 heads in 8 groups (Llama 3.2, 2024); everything inside
a block is recomputed in the backward pass.
"""

import slm

config = slm.Experiment(
    name="slm_1b",
    model=slm.ModelConfig(
        vocab_size=49152, layers=16, width=2048, heads=32, kv_heads=8, mlp_width=8192,
        rope=slm.RopeConfig(theta=500_000.0), remat="full",
    ),
    data=slm.DataConfig(source=("tfds:wikipedia/20230601.en/train",), tokenizer="bpe:49152", sequence_length=2048),
    optim=slm.OptimConfig(name="muon", learning_rate=1e-3, schedule="wsd", warmup_steps=1000, final_ratio=0.0),
    train=slm.TrainConfig(
        steps=20000, batch_size=512, accumulation=4, precision="bfloat16", z_loss=1e-4, evaluate_every=1000,
        evaluate_sequences=2048,
    ),
    checkpoint=slm.CheckpointConfig(every=1000),
)  # fmt: skip
