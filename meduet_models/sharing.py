"""Which parts of the model are the federation's (content) and which stay home (style).

The model declares its parts (`CONTENT_PARTS`, `STYLE_PARTS`, `SITE_PARTS`, `CONSTANTS`); here they become
names of tensors. Nothing is decided by what a name looks like. A tensor that no part declares is an error,
not a guess.

Source: FedBN (arXiv:2102.07623) and PaDPaF for keeping style at home; docs/privacy.md for the site
classifiers, whose gradient gives away the one pooled vector per scan that they see.
"""

from torch import nn

from meduet_models.meduet import FactorNetwork

_NORMS = (nn.LayerNorm, nn.InstanceNorm3d)


def content_keys(model: FactorNetwork) -> tuple[str, ...]:
    """Tensors of the content branch."""
    return _of_parts(model, model.CONTENT_PARTS)


def style_keys(model: FactorNetwork) -> tuple[str, ...]:
    """Tensors of the style branch."""
    return _of_parts(model, model.STYLE_PARTS)


def site_keys(model: FactorNetwork) -> tuple[str, ...]:
    """Tensors of the site classifiers."""
    return _of_parts(model, model.SITE_PARTS)


def constant_keys(model: FactorNetwork) -> tuple[str, ...]:
    """Tensors that are agreed on once and never trained: latent scale and erasure. Their update is exactly
    zero."""
    return _of_parts(model, model.CONSTANTS)


def encoder_keys(model: FactorNetwork) -> tuple[str, ...]:
    """Content branch and constants together: all that reading content takes."""
    return _of_parts(model, (*model.CONTENT_PARTS, *model.CONSTANTS))


def output_keys(model: FactorNetwork) -> tuple[str, ...]:
    """Weights and biases of the output layer, which changes reconstructions and nothing that is read from
    content."""
    layer = model.get_submodule(model.OUTPUT_LAYER)
    return tuple(f"{model.OUTPUT_LAYER}.{name}" for name in layer.state_dict())


def norm_keys(model: FactorNetwork) -> tuple[str, ...]:
    """Weights and biases of the norm layers."""
    layers = [name for name, module in model.named_modules() if isinstance(module, _NORMS)]
    return tuple(name for name in model.state_dict() if name.rsplit(".", 1)[0] in layers)


def shared_keys(model: FactorNetwork, style_head: str, method: str) -> tuple[str, ...]:
    """Tensors that travel, in the model's order; `constant_keys` are among them, as every site needs them.

    `content_share`: content branch and constants, and the style branch when `style_head` is `shared`; the
    site classifiers never. `fedavg`, `fedprox`, `pooled`: everything, as the baselines are defined. `fedbn`:
    everything but the norm layers (FedBN, arXiv:2102.07623, with layer norms). `alone`: nothing.
    Raises `ValueError` on any other word, and when the model has a tensor that no part declares.
    """
    if style_head not in ("local", "shared"):
        raise ValueError(f"Expected style_head to be local or shared; got {style_head!r}.")
    declared = _all_keys(model)
    match method:
        case "content_share":
            chosen = {*content_keys(model), *constant_keys(model)}
            if style_head == "shared":
                chosen |= {*style_keys(model)}
        case "fedavg" | "fedprox" | "pooled":
            chosen = set(declared)
        case "fedbn":
            chosen = set(declared) - set(norm_keys(model))
        case "alone":
            chosen = set()
        case _:
            raise ValueError(
                f"Expected method content_share, fedavg, fedprox, fedbn, pooled or alone; got {method!r}."
            )
    return tuple(name for name in declared if name in chosen)


def home_keys(model: FactorNetwork, style_head: str, method: str) -> tuple[str, ...]:
    """Tensors that stay at the site: all that `shared_keys` does not name."""
    travelling = set(shared_keys(model, style_head, method))
    return tuple(name for name in _all_keys(model) if name not in travelling)


def _of_parts(model: FactorNetwork, parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in model.state_dict() if name.split(".", 1)[0] in parts)


def _all_keys(model: FactorNetwork) -> tuple[str, ...]:
    parts = (*model.CONTENT_PARTS, *model.STYLE_PARTS, *model.SITE_PARTS, *model.CONSTANTS)
    names = tuple(model.state_dict())
    if stray := [name for name in names if name.split(".", 1)[0] not in parts]:
        raise ValueError(
            f"Expected every tensor to belong to a declared part; {stray[0]!r} does not: declare its part."
        )
    return names
