"""In-context recall of MAD (Poli et al. 2024, arXiv:2403.17844), reduced: width 64 instead of 128, 1.5 passes over
the 12,800 samples in batches of 16 instead of 200 in batches of 128. The task itself is the published one.

The other five: mad_noisy_recall, mad_fuzzy_recall, mad_memorisation, mad_compression (with --data.sequence_length 62),
mad_selective_copying (256) in place of mad_recall; their settings in slm.data.synthetic.mad. The benchmark's own sizes:
--model.width 128 --model.heads 16 --train.batch_size 128 --train.steps 20000, and the best of learning rates 0.0001,
0.0005, 0.001 and weight decays 0, 0.1.

Command:   python train.py configs/mad_recall_reduced.py --model.attention base_conv softmax
Hardware:  2 CPU cores
Time:      about 3 minutes on a busy machine
Expected:  accuracy 1.00, from step 300 on (seed 0, 256 tests); with softmax alone, which must learn to look at the
           previous token, 0.30 after these steps (published at full size: 0.94, mean over the sweep and over classes)
"""

import slm

config = slm.Experiment(
    name="mad_recall_reduced",
    # Two blocks, whose feed-forwards are as wide as SwiGLU's usually are.
    model=slm.ModelConfig(layers=2, width=64, heads=4, attention=("base_conv", "softmax")),
    data=slm.DataConfig(source=("synthetic:mad_recall",), sequence_length=128),
    optim=slm.OptimConfig(
        learning_rate=2e-3, schedule="cosine", warmup_steps=100, final_ratio=0.0, b2=0.999, weight_decay=0.1
    ),
    train=slm.TrainConfig(steps=1200, batch_size=16, evaluate_every=300, evaluate_sequences=256, log_every=100),
    checkpoint=slm.CheckpointConfig(every=600),
)
