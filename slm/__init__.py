"""slm: small language models in JAX."""
