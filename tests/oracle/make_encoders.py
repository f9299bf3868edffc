"""Writes what `transformers` computes for tiny encoders: tests/oracle/encoders/NAME.npz and NAME.json.

    python tests/oracle/make_encoders.py [NAME ...]        (needs torch and transformers 5, see the `bench` extra)

As make_decoders.py: the weights are not stored, tests/oracle/weights.py makes them. Each file holds config.json, the
tensors' names and shapes, tokens, token types where there are any, a padding mask, and the output of the head: logits;
of a model without a head its last hidden states (`hidden`) and, where it has one, the pooler's output (`pooled`).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from weights import ORACLE, weights_of

V, D = 96, 32
BERT = {"vocab_size": V, "hidden_size": D, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 24, "type_vocab_size": 3}  # fmt: skip
DISTIL = {"vocab_size": V, "dim": D, "hidden_dim": 56, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 24}
ALBERT = BERT | {"embedding_size": 20, "num_hidden_layers": 4}
MODERN = {"vocab_size": V, "hidden_size": D, "intermediate_size": 56, "num_hidden_layers": 8, "num_attention_heads": 4,
          "max_position_embeddings": 64, "local_attention": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "cls_token_id": 1, "sep_token_id": 2,
          "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1000.0},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}  # fmt: skip
MOBILE = BERT | {"embedding_size": 12, "intra_bottleneck_size": 16, "num_feedforward_networks": 3}
FIVE = {"num_labels": 5}
# name: (model class, settings of its config)
CASES = {
    "bert": ("BertForMaskedLM", BERT),
    "bert_sequence": ("BertForSequenceClassification", BERT | FIVE),
    "bert_token": ("BertForTokenClassification", BERT | FIVE | {"hidden_act": "relu"}),
    "bert_model": ("BertModel", BERT),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "distilbert_sequence": ("DistilBertForSequenceClassification", DISTIL | FIVE),
    "distilbert_token": ("DistilBertForTokenClassification", DISTIL | FIVE),
    "distilbert_model": ("DistilBertModel", DISTIL),
    "albert": ("AlbertForMaskedLM", ALBERT),
    "albert_sequence": ("AlbertForSequenceClassification", ALBERT | FIVE),
    "albert_token": ("AlbertForTokenClassification", ALBERT | FIVE),
    "albert_model": ("AlbertModel", ALBERT),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "modernbert_biased": ("ModernBertForMaskedLM", MODERN | {"norm_bias": True, "attention_bias": True,
                          "mlp_bias": True, "classifier_bias": True, "decoder_bias": False, "num_hidden_layers": 3,
                          "tie_word_embeddings": False, "classifier_activation": "relu"}),
    "modernbert_sequence": ("ModernBertForSequenceClassification", MODERN | FIVE),
    "modernbert_mean": ("ModernBertForSequenceClassification", MODERN | FIVE | {"classifier_pooling": "mean",
                        "num_hidden_layers": 2}),
    "modernbert_token": ("ModernBertForTokenClassification", MODERN | FIVE | {"num_hidden_layers": 1}),
    "modernbert_model": ("ModernBertModel", MODERN),
    "mobilebert": ("MobileBertForMaskedLM", MOBILE),
    "mobilebert_sequence": ("MobileBertForSequenceClassification", MOBILE | FIVE),
    "mobilebert_token": ("MobileBertForTokenClassification", MOBILE | FIVE | {"num_feedforward_networks": 1}),
    "mobilebert_model": ("MobileBertModel", MOBILE | {"hidden_act": "gelu"}),
}  # fmt: skip


def main(names):
    (ORACLE / "encoders").mkdir(exist_ok=True)
    for name in names or CASES:
        architecture, settings = CASES[name]
        cls = getattr(transformers, architecture)
        fresh = cls(cls.config_class(**settings))
        with tempfile.TemporaryDirectory() as folder:
            # The names and shapes as they stand in files, which may differ from those in memory.
            fresh.save_pretrained(folder)
            file = Path(folder) / "model.safetensors"
            shapes = {key: list(value.shape) for key, value in load_file(file).items()}
            save_file(weights_of(shapes), file, metadata={"format": "pt"})
            model = cls.from_pretrained(folder, attn_implementation="eager").eval()
        random = np.random.default_rng(0)
        tokens = torch.from_numpy(random.integers(0, V, (2, 14)))
        mask = torch.ones_like(tokens)
        mask[1, 9:] = 0
        inputs = {"attention_mask": mask}
        if "type_vocab_size" in settings:
            inputs["token_type_ids"] = torch.from_numpy(random.integers(0, settings["type_vocab_size"], (2, 14)))
        with torch.no_grad():
            out = model(tokens, **inputs)
        arrays = {"tokens": tokens.numpy(), "mask": mask.numpy()}
        if "token_type_ids" in inputs:
            arrays["token_types"] = inputs["token_type_ids"].numpy()
        for key, value in (("logits", out.get("logits")), ("hidden", out.get("last_hidden_state")),
                           ("pooled", out.get("pooler_output"))):  # fmt: skip
            if value is not None:
                arrays[key] = value.numpy()
        np.savez_compressed(ORACLE / "encoders" / f"{name}.npz", **arrays)
        config = json.loads(model.config.to_json_string(use_diff=False))
        config.pop("_name_or_path", None)  # the temporary folder
        record = {"transformers": transformers.__version__, "config": config, "shapes": shapes}
        (ORACLE / "encoders" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(name, {key: float(np.abs(x).max()) for key, x in arrays.items() if x.dtype == np.float32})


if __name__ == "__main__":
    main(sys.argv[1:])
