"""The classic: characters of Shakespeare, at the size of nanoGPT's published CPU setting (0.8 M parameters).

Command:   python train.py configs/shakespeare_char.py --data.source input.txt
           where input.txt is the 1.1 MB of plays known as tinyshakespeare; the last tenth is held out
Hardware:  2 CPU cores
Time:      about 4 to 6 minutes on a busy machine
Expected:  1.567 nats a character (nanoGPT's own recipe: 1.908 here, 1.88 published)
"""

import slm

config = slm.Experiment(
    name="shakespeare_char",
    model=slm.ModelConfig(layers=4, width=128, heads=4, mlp_width=352),
    data=slm.DataConfig(
        source=("input.txt",),
        validation_split="tail",
        validation_fraction=0.1,
        tokenizer="chars",
        sequence_length=64,
        packing="stream",
    ),
    optim=slm.OptimConfig(name="muon", learning_rate=1e-2, schedule="linear", final_ratio=0.0, weight_decay=0.1),
    train=slm.TrainConfig(steps=2000, batch_size=12, evaluate_every=500, evaluate_sequences=0),
    checkpoint=slm.CheckpointConfig(every=500),
)
