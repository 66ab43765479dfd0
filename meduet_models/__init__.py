"""MeDUET as tensors in, tensors out: tokenizer, network, objective, style. Knows neither Flower, Hydra nor files of patients."""
