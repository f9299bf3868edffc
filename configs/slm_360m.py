"""360 M parameters, shaped like SmolLM2-360M.

Command:   python train.py configs/slm_360m.py --data.source TEXT_FOLDER --mesh.fsdp 8
           python train.py configs/slm_360m.py --dry-run --devices 8 --mesh.fsdp 8
Hardware:  eight GPUs or a TPU slice of eight chips
Time:      not yet run
Expected:  not yet run

Choices: as configs/slm_125m.py; 1 M tokens a step, 20 tokens a parameter; the larger base of the rotary wavelengths
leaves room to lengthen the context later (Xiong et al. 2023).
"""

import slm

config = slm.Experiment(
    name="slm_360m",
    model=slm.ModelConfig(
        vocab_size=49152,
        layers=32,
        width=960,
        heads=15,
        kv_heads=5,
        mlp_width=2560,
        rope=slm.RopeConfig(theta=100_000.0),
    ),
    data=slm.DataConfig(source=("tfds:wikipedia/20230601.en/train",), tokenizer="bpe:49152", sequence_length=2048),
    optim=slm.OptimConfig(name="muon", learning_rate=1.5e-3, schedule="wsd", warmup_steps=500, final_ratio=0.0),
    train=slm.TrainConfig(
        steps=7000,
        batch_size=512,
        accumulation=8,
        precision="bfloat16",
        z_loss=1e-4,
        evaluate_every=500,
        evaluate_sequences=2048,
    ),
    checkpoint=slm.CheckpointConfig(every=500),
)
