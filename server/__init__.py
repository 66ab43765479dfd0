"""The coordinating centre: rounds, checkpoints, the tokenizer."""
