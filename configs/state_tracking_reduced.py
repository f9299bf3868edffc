"""State tracking: the word problem of the permutations of three things, S3, in words of 16 with tests of 64. Reduced:
published is S5, in words of 128 with tests of up to 512 (Merrill et al. 2024, arXiv:2404.08819; Siems et al. 2025,
DeltaProduct, arXiv:2502.10297), which takes hours on a processor: after 500 of these steps it has hardly begun.

Published: --data.source synthetic:word_problem --data.validation synthetic:word_problem:length=512
--data.sequence_length 128 --data.validation_length 512 --model.width 128 --model.heads 4, on a GPU. Other groups:
word_problem:group=Z60, A5, A4xZ5; running_parity and modular_addition are tasks of their own.

Command:   python train.py configs/state_tracking_reduced.py --model.attention delta_product
           against softmax, delta, gated_delta, gated_delta_negative, rwkv7
Hardware:  2 CPU cores
Time:      about 4 minutes on a busy machine, of which 1 is compilation
Expected:  accuracy over prefixes 0.50 in words of 16 and 0.37 in words of 64 (seed 0; chance 0.17): the sign of the
           permutation is tracked, the rest only at the start; more --model.mixer.householders and steps go on
"""

import slm

SOURCE = "synthetic:word_problem:group=S3,length={length},tests={tests}"

config = slm.Experiment(
    name="state_tracking_reduced",
    model=slm.ModelConfig(layers=1, width=64, heads=2, attention=("delta_product",), position="none"),
    data=slm.DataConfig(
        source=(SOURCE.format(length=16, tests=256),),
        validation=(SOURCE.format(length=16, tests=256), SOURCE.format(length=64, tests=256)),
        sequence_length=16,
        validation_length=64,
    ),
    optim=slm.OptimConfig(
        learning_rate=1e-2, schedule="cosine", warmup_steps=50, final_ratio=0.0, b2=0.999, weight_decay=0.01
    ),
    train=slm.TrainConfig(steps=1500, batch_size=64, evaluate_every=250, evaluate_sequences=0, log_every=50),
    checkpoint=slm.CheckpointConfig(every=500),
)
