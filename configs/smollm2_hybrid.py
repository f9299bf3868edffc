"""SmolLM2-135M with linear attention in two layers of three: the same model, with a third of the cache.

Command:   python train.py configs/smollm2_hybrid.py --data.source TEXT_FOLDER
           (models/SmolLM2-135M: a Hugging Face folder or a .gguf file, --model.init-from and --distill.teacher)
Hardware:  one GPU
Time:      not yet run on one; of a small model, see benchmarks/README.md
Expected:  not yet run on one; of a small model, see benchmarks/README.md

Choices: every third layer stays softmax, for exact recall (hybrids of MambaInLlama, Wang et al. 2024, keep a quarter to
a half); gated delta rule, which in our small conversion brought back more than feature maps that imitate softmax
(Hedgehog). For a tenth of the steps each new mixer imitates the one that it replaces; then the whole model learns from
the whole SmolLM2 at temperature 1 (alpha 0.9).
"""

import slm

WHOLE = "models/SmolLM2-135M"

config = slm.Experiment(
    name="smollm2_hybrid",
    model=slm.ModelConfig(init_from=WHOLE),
    convert=slm.ConvertConfig(attention=("gated_delta", "gated_delta", "softmax"), transfer_steps=500),
    distill=slm.DistillConfig(teacher=WHOLE, alpha=0.9),
    data=slm.DataConfig(source=("data/text",), sequence_length=1024),
    optim=slm.OptimConfig(learning_rate=6e-4, warmup_steps=50, weight_decay=0.0, final_ratio=0.0),
    train=slm.TrainConfig(steps=5000, batch_size=64, accumulation=4, precision="bfloat16", evaluate_every=500),
    checkpoint=slm.CheckpointConfig(every=500),
)
