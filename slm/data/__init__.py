"""From text to batches: sources, tokenizers, cached token arrays, windows, and the pipeline that ties them together."""
