"""The smallest model that chats, of random weights: bytes and ChatML's markers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken

import slm
from slm.config import Experiment, ModelConfig
from slm.data.tokenizers import Tokenizer, build_tokenizer
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

CHATML = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS = {"chat_template": CHATML, "eos_token": "<|endoftext|>"}


def random_talker(**changes) -> LanguageModel:
    """256 ends texts, 257 begins turns, 258 ends them. `changes`: fields of its ModelConfig."""
    backend = build_tokenizer("bytes", lambda: iter(())).backend
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer = Tokenizer(backend)
    cfg = ModelConfig(**{"vocab_size": tokenizer.vocab_size, "layers": 1, "width": 16, "heads": 2} | changes)
    shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), jnp.float32), shapes)
    return LanguageModel(params, Experiment(name="toy", model=cfg), tokenizer)


def write_talker(folder, **changes):
    """A Hugging Face folder with such a model."""
    slm.save_pretrained(random_talker(**changes), folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return folder
