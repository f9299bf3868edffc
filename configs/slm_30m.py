"""30 M parameters: the size at which ideas are tried.

Command:   python train.py configs/slm_30m.py --data.source TEXT_FOLDER
           python train.py configs/slm_30m.py --dry-run --devices 1      (parameters, memory, FLOPs; trains nothing)
Hardware:  one GPU or TPU
Time:      not yet run
Expected:  not yet run

Choices: deep and thin with grouped-query attention and tied embeddings (MobileLLM, Liu et al. 2024); QK-norm
(OLMo 2, 2025); SwiGLU; Muon with AdamW's learning rate (Moonlight, Liu et al. 2025); warm-up, constant, then linear
decay to zero (WSD: MiniCPM, Hu et al. 2024; to zero: Bergsma et al. 2025); z-loss 1e-4 (PaLM). About 20 tokens a
parameter (Hoffmann et al. 2022): 128 x 1024 tokens a step.
"""

import slm

config = slm.Experiment(
    name="slm_30m",
    model=slm.ModelConfig(vocab_size=16384, layers=14, width=384, heads=6, kv_heads=2, mlp_width=1152),
    data=slm.DataConfig(source=("tfds:wikipedia/20230601.en/train",), tokenizer="bpe:16384", sequence_length=1024),
    optim=slm.OptimConfig(name="muon", learning_rate=3e-3, schedule="wsd", warmup_steps=200, final_ratio=0.0),
    train=slm.TrainConfig(
        steps=5000,
        batch_size=128,
        accumulation=2,
        precision="bfloat16",
        z_loss=1e-4,
        evaluate_every=500,
        evaluate_sequences=1024,
    ),
    checkpoint=slm.CheckpointConfig(every=500),
)
