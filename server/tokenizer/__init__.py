"""Training and judging the small tokenizer."""
