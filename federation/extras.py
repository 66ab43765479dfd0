"""Packages that an installation may lack, and the extra of `fedmeduet` that brings each.

`pip install fedmeduet` brings what published weights need; sites, centre and simulations need more. A command
that meets a package that is not there says so in one line (`federation/terminal.py`).

Does not do: look whether anything is installed; whoever imports finds out.
"""

from collections.abc import Mapping

EXTRAS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "flwr", "ray", "dp_accounting", "nilearn", "sklearn", "opacus", "Crypto", "grpc", "grpc_health",
            "httpx", "hydra", "omegaconf", "uvicorn", "matplotlib", "jinja2", "tensorboard",
        ),
        "federation",
    ),
    "onnx": "export",
    "onnxscript": "export",
    "mlflow": "mlflow",
}  # fmt: skip
"""Import name of a package to the extra that brings it."""


def told(error: ModuleNotFoundError) -> str | None:
    """One line that says what to install; None for a package that no extra brings."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"Expected the package {package}; it is not installed: pip install 'fedmeduet[{EXTRAS[package]}]'."
