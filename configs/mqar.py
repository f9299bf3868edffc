"""Multi-query associative recall with the published settings of Zoology (Arora et al. 2023, arXiv:2312.04927;
github.com/HazyResearch/zoology, zoology/experiments/mqar_example_configs/original_mqar_configs.py).

Two layers, a gated convolution and the mechanism under test, without feed-forwards and positions. Any other mechanism
takes softmax's place, with other state sizes by --model.width (64, 128, 256), --model.mixer.expand_k, expand_v or
feature_dim; report the best of four learning rates (0.001, 0.00316, 0.01, 0.0316) for each.

Command:   python train.py configs/mqar.py --model.attention base_conv softmax --optim.learning_rate 0.00316
           The variants: forgetting_mqar or compositional_mqar in the sources, with the lengths and pairs that
           slm.data.synthetic.recall names, and --data.validation_length 2048
Hardware:  one GPU
Time:      22,500 steps of 256 x 256 tokens (32 passes over 180,000 samples); not measured
Expected:  published, best rate, mean accuracy over the seven tests (ours not run): softmax 1.00, gated_delta 0.99,
           delta 0.96 to 0.995 and based 0.84 to 0.99 with 25 kB of state and more, window of 128 0.66

Differences: no dropout (0.1 on embeddings there); no weight decay on embeddings and norms; rows of different settings
share a batch, each padded to the longest and each sample counting alike, where Zoology's batches hold one setting; the
learning rate falls each step, not each epoch, and training is not stopped at 99 %.
"""

import slm

TRAINING = ((100_000, 64, 4), (20_000, 128, 8), (20_000, 256, 16), (20_000, 256, 32), (20_000, 256, 64))
TESTS = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))

config = slm.Experiment(
    name="mqar",
    model=slm.ModelConfig(
        layers=2,
        width=128,
        heads=2,
        attention=("base_conv", "softmax"),
        position="none",
        mlp="none",
        norm="layernorm",
    ),
    data=slm.DataConfig(
        source=tuple(
            f"synthetic:mqar:vocab=8192,length={length},pairs={pairs},samples={samples},weigh=samples"
            for samples, length, pairs in TRAINING
        ),
        weights=(5.0, 1.0, 1.0, 1.0, 1.0),
        validation=tuple(
            f"synthetic:mqar:vocab=8192,length={length},pairs={pairs},tests=1000,weigh=samples"
            for length, pairs in TESTS
        ),
        sequence_length=256,
        validation_length=1024,
    ),
    optim=slm.OptimConfig(
        learning_rate=3.16e-3,
        schedule="cosine",
        warmup_steps=0,
        final_ratio=0.0,
        b2=0.999,
        weight_decay=0.1,
        clip_norm=None,
    ),
    train=slm.TrainConfig(steps=22_500, batch_size=256, evaluate_every=2250, evaluate_sequences=0, log_every=100),
    checkpoint=slm.CheckpointConfig(every=2250),
)
