"""An OpenAI-compatible HTTP server: `python -m slm.serve MODEL`."""
