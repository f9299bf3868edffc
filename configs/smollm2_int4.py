"""The shrunken SmolLM2 with weights of 4 bits, trained as it will run: the second link of the chain to a phone.

Command:   python train.py configs/smollm2_int4.py --data.source TEXT_FOLDER     (after configs/smollm2_shrunk.py)
           python eval.py runs/smollm2_int4 --save smollm2_int4.gguf             (for llama.cpp; Q4_0 and Q8_0, exactly)
           small scale, 2 CPU cores: --data.sequence-length 256 --train.batch-size 2 --train.accumulation 1
           --train.steps 15 --optim.warmup-steps 5 --train.precision float32
Hardware:  one GPU
Time:      not yet run on one; small scale: 4 minutes
Expected:  not yet run on one; small scale: perplexity 46.9 in 69 MB, 47.7 by rounding alone (benchmarks/README.md)

Choices: groups of 32 with symmetric codes, which is llama.cpp's Q4_0, and an embedding of 8 bits; scales from the
weights at each step, gradients straight through; the whole SmolLM2 still teaches, since its distribution is what
rounding disturbs; a tenth of the learning rate before.
"""

import slm

config = slm.Experiment(
    name="smollm2_int4",
    model=slm.ModelConfig(init_from="runs/smollm2_shrunk"),
    quantize=slm.QuantizeConfig(scheme="int4", group_size=32, embedding=True),
    distill=slm.DistillConfig(teacher="models/SmolLM2-135M", alpha=0.9),
    data=slm.DataConfig(source=("data/text",), sequence_length=1024),
    optim=slm.OptimConfig(learning_rate=6e-5, warmup_steps=20, weight_decay=0.0, final_ratio=0.0),
    train=slm.TrainConfig(steps=1000, batch_size=64, accumulation=4, precision="bfloat16", evaluate_every=250),
)
