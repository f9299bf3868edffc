"""Writes what `transformers` computes for tiny decoders of each family: tests/oracle/NAME.npz and NAME.json.

    python tests/oracle/make_decoders.py [NAME ...]        (needs torch and transformers 5, see the `bench` extra)

The weights are not stored: tests/oracle/weights.py makes them from the names and shapes of the tensors. Each file holds
config.json (as transformers writes it), the tensors' names and shapes, tokens, a padding mask, the logits with it, the
hidden states of all layers, and for some the gradients of the mean next-token loss.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from weights import weights_of

HERE = Path(__file__).parent
V, D = 96, 32
LLAMA = {"vocab_size": V, "hidden_size": D, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16}  # fmt: skip
GEMMA = LLAMA | {"head_dim": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 3.5]}
NEOX = {"vocab_size": V, "hidden_size": D, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 64}  # fmt: skip
# name: (model class, settings of its config, whether gradients are stored)
CASES = {
    "llama": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, True),
    "llama_biased": ("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 12,
                     "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}, False),
    "llama_yarn": ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0,
                   "factor": 4.0, "original_max_position_embeddings": 16}}, False),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA | {"num_hidden_layers": 4, "no_rope_layer_interval": 2,
                "pad_token_id": 0}, False),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
              "num_hidden_layers": 3}, False),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}, True),
    "gemma": ("GemmaForCausalLM", GEMMA, False),
    "gemma2": ("Gemma2ForCausalLM", GEMMA | {"query_pre_attn_scalar": 24, "sliding_window": 4,
               "num_hidden_layers": 4, "pad_token_id": None,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}, True),
    "gemma3": ("Gemma3ForCausalLM", GEMMA | {"query_pre_attn_scalar": 24, "sliding_window": 4, "num_hidden_layers": 7,
               "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
               "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}, False),
    "granite": ("GraniteForCausalLM", LLAMA | {"embedding_multiplier": 6.0, "logits_scaling": 1.7,
                "residual_multiplier": 0.3, "attention_multiplier": 0.2, "attention_bias": True}, False),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 4, "head_dim": 16}, False),
    "ministral": ("MinistralForCausalLM", LLAMA | {"sliding_window": 4, "head_dim": 16, "num_hidden_layers": 4,
                  "layer_types": ["sliding_attention", "full_attention"] * 2}, False),
    "ministral3": ("Ministral3ForCausalLM", LLAMA | {"head_dim": 16, "rope_parameters": {"rope_type": "yarn",
                   "rope_theta": 100.0, "factor": 16.0, "original_max_position_embeddings": 6,
                   "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                   "llama_4_scaling_beta": 0.3}}, False),
    "phi": ("PhiForCausalLM", LLAMA | {"partial_rotary_factor": 0.5}, False),
    "phi3": ("Phi3ForCausalLM", LLAMA | {"sliding_window": 4, "pad_token_id": 0}, False),
    "phi3_long": ("Phi3ForCausalLM", LLAMA | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 8,
                  "max_position_embeddings": 32, "pad_token_id": 0, "tie_word_embeddings": True,
                  "rope_parameters": LONG}, False),
    "phi3_short": ("Phi3ForCausalLM", LLAMA | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 16,
                   "max_position_embeddings": 32, "pad_token_id": 0, "rope_parameters": LONG}, False),
    "neox": ("GPTNeoXForCausalLM", NEOX | {
             "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.25}}, False),
    "neox_serial": ("GPTNeoXForCausalLM", NEOX | {"use_parallel_residual": False, "attention_bias": False}, False),
    "mamba2": ("Mamba2ForCausalLM", {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_heads": 8,
               "head_dim": 8, "state_size": 12, "n_groups": 2, "use_bias": True, "chunk_size": 8}, False),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 5,
                        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 1, "lru_width": 48,
                        "attention_window_size": 4, "conv1d_width": 3, "logits_soft_cap": 5.0}, False),
    "qwen3_next": ("Qwen3NextForCausalLM", LLAMA | {"num_hidden_layers": 4, "head_dim": 16, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
                   "num_experts": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                   "partial_rotary_factor": 0.25}}, False),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 24}, False),
}  # fmt: skip


def main(names):
    for name in names or CASES:
        architecture, settings, gradients = CASES[name]
        cls = getattr(transformers, architecture)
        fresh = cls(cls.config_class(**settings))
        with tempfile.TemporaryDirectory() as folder:
            # The names and shapes as they stand in files, which may differ from those in memory.
            fresh.save_pretrained(folder)
            file = Path(folder) / "model.safetensors"
            shapes = {key: list(value.shape) for key, value in load_file(file).items()}
            save_file(weights_of(shapes), file, metadata={"format": "pt"})
            model = cls.from_pretrained(folder, attn_implementation="eager").eval()
        tokens = torch.from_numpy(np.random.default_rng(0).integers(0, V, (2, 14)))
        mask = torch.ones_like(tokens)
        mask[1, 9:] = 0
        out = model(tokens, attention_mask=mask, output_hidden_states=True)
        states = out.hidden_states
        if name == "mamba2":  # which leaves out the embedded tokens, and adds the last layer's before the norm
            states = (model.get_input_embeddings()(tokens), *states[:-2], states[-1])
        arrays = {"tokens": tokens.numpy(), "mask": mask.numpy(), "logits": out.logits.detach().numpy(),
                  "hidden": np.stack([h.detach().numpy() for h in states])}  # fmt: skip
        if gradients:
            whole = model(tokens)
            loss = torch.nn.functional.cross_entropy(whole.logits[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1))
            loss.backward()
            arrays["loss"] = loss.detach().numpy()
            arrays |= {f"d {key}": p.grad.numpy() for key, p in model.named_parameters() if key in shapes}
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
        config = json.loads(model.config.to_json_string(use_diff=False))
        config.pop("_name_or_path", None)  # the temporary folder
        record = {"transformers": transformers.__version__, "config": config, "shapes": shapes}
        (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(name, "largest logit", float(np.abs(arrays["logits"]).max()), "std", float(arrays["logits"].std()))


if __name__ == "__main__":
    main(sys.argv[1:])
