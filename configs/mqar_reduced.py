"""Multi-query associative recall, reduced to minutes on a laptop: vocabulary 256 instead of 8192, lengths up to 128
instead of 1024, 16 pairs in training instead of 64, width 64. configs/mqar.py is the published setting.

Command:   python train.py configs/mqar_reduced.py --model.attention base_conv delta
           Any other mechanism in place of delta, the same everywhere else; the best of several
           --optim.learning_rate counts
Hardware:  2 CPU cores
Time:      2 to 3 minutes, three times that on a busy machine
Expected:  accuracy by tests (in validation_by_source) of delta: 1.00, 1.00, 1.00 and 0.94 (seed 0); slower starters
           such as mamba2 need --train.steps 2000
"""

import slm

config = slm.Experiment(
    name="mqar_reduced",
    model=slm.ModelConfig(
        layers=2,
        width=64,
        heads=2,
        attention=("base_conv", "delta"),
        position="none",
        mlp="none",
        norm="layernorm",
    ),
    data=slm.DataConfig(
        source=(
            "synthetic:mqar:vocab=256,length=64,pairs=4,samples=40000,weigh=samples",
            "synthetic:mqar:vocab=256,length=64,pairs=8,samples=20000,weigh=samples",
            "synthetic:mqar:vocab=256,length=64,pairs=16,samples=20000,weigh=samples",
        ),
        weights=(2.0, 1.0, 1.0),
        validation=(
            "synthetic:mqar:vocab=256,length=64,pairs=4,tests=200,weigh=samples",
            "synthetic:mqar:vocab=256,length=64,pairs=8,tests=200,weigh=samples",
            "synthetic:mqar:vocab=256,length=64,pairs=16,tests=200,weigh=samples",
            "synthetic:mqar:vocab=256,length=128,pairs=32,tests=200,weigh=samples",
        ),
        sequence_length=64,
        validation_length=128,
    ),
    optim=slm.OptimConfig(
        learning_rate=1e-2, schedule="cosine", warmup_steps=100, final_ratio=0.0, b2=0.95, weight_decay=0.1
    ),
    train=slm.TrainConfig(steps=1000, batch_size=64, evaluate_every=500, evaluate_sequences=0, log_every=50),
    checkpoint=slm.CheckpointConfig(every=500),
)
