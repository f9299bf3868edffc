"""Models of other houses, in and out: Hugging Face folders, one short file a family."""
