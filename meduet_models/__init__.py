"""MeDUET as tensors in, tensors out. Knows neither Flower, Hydra nor files of patients."""
