"""The model card of an export: what the weights are, from what, for what, and what nobody has tested.

Made from the run (`facts.py`); what the centre does not know it says. Source of the headings: Mitchell et al.
2019, Model Cards for Model Reporting (arXiv:1810.03993).
"""

from server.export.facts import INTENDED, UNTESTED, Release

_USE = """\
```python
import meduet_models                      # pip install fedmeduet

model = meduet_models.load("THIS_FOLDER")
code = model.embed("scan.nii.gz")         # {size}
```
"""


def model_card(release: Release, use: str = _USE) -> str:
    """Markdown with the front matter that model hubs read."""
    config, volumes = release.config(), release.volumes
    size = f"{config['code_size']} numbers" if config["code_size"] else "none: this run fitted no code"
    spacing, shape = (" x ".join(f"{n:g}" for n in values) for values in (volumes.spacing_mm, volumes.shape))
    patients = f"at least {release.patients}" if release.patients else "not told"
    ages = "not told to the coordinating centre, and so not known here"
    lines = [
        "---",
        f"license: {'other' if ' ' in release.licence else release.licence.lower()}",
        "library_name: fedmeduet",
        "pipeline_tag: image-feature-extraction",
        "tags: [medical-imaging, federated-learning, self-supervised-learning, 3d]",
        "---",
        "",
        f"# {release.plan.name}",
        "",
        "A MeDUET network (content and style of 3D scans parted), pretrained across hospitals without moving "
        "a scan. Every number on this page comes from the run.",
        "",
        "| | |",
        "|---|---|",
        f"| sites | {config['sites']} (names stay with the consortium) |",
        f"| patients | {patients} (rounded down to whole minimum cohorts) |",
        f"| ages, sexes | {ages} |",
        f"| scans | {volumes.modality}; window {volumes.window}; {spacing} mm; {shape} voxels; "
        f"{volumes.extent} |",
        f"| rounds | {config['rounds']} of {release.plan.training.steps_per_round} steps at each site |",
        f"| code | {size} |",
        f"| licence of the weights | {release.licence} |",
        f"| plan | `{config['plan_sha256']}` |",
        f"| tensors | `{config['tensors_sha256']}` |",
        f"| tokenizer | {config['tokenizer']['name']}, `{config['tokenizer']['sha256']}` |",
        "",
        "## Use",
        "",
        use.format(size=size).rstrip(),
        "",
        "## What was promised of what left the sites",
        "",
        *(f"- {sentence}" for sentence in release.promises),
        "",
        "## Intended use",
        "",
        INTENDED,
        "",
        "## Not tested",
        "",
        UNTESTED,
        "",
    ]
    return "\n".join(lines)
