"""125 M parameters, shaped like SmolLM2-135M.

Command:   python train.py configs/slm_125m.py --data.source TEXT_FOLDER
           python train.py configs/slm_125m.py --dry-run --devices 8 --mesh.fsdp 8
Hardware:  one GPU or TPU with 40 GB or more (16 micro-batches; with 8 devices: --train.accumulation 2)
Time:      not yet run
Expected:  not yet run

Choices: as configs/slm_30m.py; width, heads and groups of SmolLM2 (Allal et al. 2025), whose 49,152-word vocabulary
is tied; 0.5 M tokens a step, 20 tokens a parameter.
"""

import slm

config = slm.Experiment(
    name="slm_125m",
    model=slm.ModelConfig(vocab_size=49152, layers=28, width=576, heads=9, kv_heads=3, mlp_width=1536),
    data=slm.DataConfig(source=("tfds:wikipedia/20230601.en/train",), tokenizer="bpe:49152", sequence_length=2048),
    optim=slm.OptimConfig(name="muon", learning_rate=2e-3, schedule="wsd", warmup_steps=300, final_ratio=0.0),
    train=slm.TrainConfig(
        steps=5000,
        batch_size=256,
        accumulation=16,
        precision="bfloat16",
        z_loss=1e-4,
        evaluate_every=500,
        evaluate_sequences=1024,
    ),
    checkpoint=slm.CheckpointConfig(every=500),
)
