"""`meduet-server plan`, `finetuning` and `publish`: make a consortium's plan, and publish
it for the sites to approve.

What it does not do: any of the work; see `plans.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from federation.terminal import say


def add_to(commands: Any) -> None:
    """Add `plan`, `finetuning` and `publish` to the parser of `meduet-server`."""
    about = "make the plan of a consortium's run from settings"
    plan = commands.add_parser(
        "plan",
        help=about,
        description=f"{about.capitalize()}, for `publish`. Settings are those of `meduet-simulate` that "
        "sites must agree on: network=paper training.rounds=100 release.wire_dtype=mxint8 ...",
    )
    plan.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="in place of those in conf/")
    plan.add_argument(
        "--consortium",
        type=Path,
        required=True,
        metavar="FILE",
        help="consortium.yaml, which names the sites",
    )
    plan.add_argument(
        "--out",
        type=Path,
        default=Path("plan.json"),
        metavar="FILE",
        help="where to write (default: plan.json)",
    )
    plan.add_argument(
        "--bank-key",
        type=Path,
        metavar="FILE",
        help="of a plan under which latents leave: the key of the bank they are sealed to, made when there "
        "is none; keep it as secret as the bank",
    )
    plan.add_argument(
        "--anatomy",
        type=Path,
        metavar="FILE",
        help="the file of pretrain-public that anatomy_start is read from, in place of ours",
    )
    plan.set_defaults(run=_plan)
    about = "draw a plan's public scans again, and say whether they are the plan's"
    public = commands.add_parser(
        "public-scans",
        help=about,
        description=f"{about.capitalize()}: latents of phantoms, in which no patient is. `plan privacy=sums` "
        "draws them beside the plan; a run draws them itself, or takes the file from its folder.",
    )
    public.add_argument("plan", type=Path, metavar="PLAN.json", help="a plan with privacy")
    public.add_argument(
        "--out",
        type=Path,
        default=Path("public_scans.safetensors"),
        metavar="FILE",
        help="where to write (default: public_scans.safetensors)",
    )
    public.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="the plan's tokenizer (default: the package's)"
    )
    public.set_defaults(run=_public_scans)
    about = "make a fine-tuning of a finished run"
    finetuning = commands.add_parser(
        "finetuning",
        help=about,
        description=f"{about.capitalize()}, for `publish --finetuning`: local.task=segmentation "
        "local.classes=3 rounds=5 ... The run's plan and the hash of its encoder are read from its weights.",
    )
    finetuning.add_argument(
        "pretrained", type=Path, metavar="RUN", help="folder of the finished run, or its model.safetensors"
    )
    finetuning.add_argument(
        "--anatomy",
        type=Path,
        metavar="FILE",
        help="the file of pretrain-public that anatomy_start is read from, in place of ours",
    )
    finetuning.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="of the fine-tuning")
    finetuning.add_argument(
        "--out",
        type=Path,
        default=Path("finetuning.json"),
        metavar="FILE",
        help="where to write (default: finetuning.json)",
    )
    finetuning.set_defaults(run=_finetuning)
    about = "publish a plan as a file that every site looks at and approves"
    publish = commands.add_parser(
        "publish",
        help=about,
        description=f"{about.capitalize()}. It names the plan's hash and that of the code; sites that "
        "approved both, and no others, take part.",
    )
    publish.add_argument("plan", type=Path, metavar="PLAN.json", help="a run's plan.json")
    publish.add_argument(
        "--finetuning", type=Path, metavar="FILE", help="publish this fine-tuning of the run instead"
    )
    publish.add_argument(
        "--out", type=Path, default=Path("plans"), metavar="DIR", help="folder to write to (default: ./plans)"
    )
    publish.set_defaults(run=_publish)


def _plan(chosen: argparse.Namespace, console: Console) -> None:
    from server.consortium.plans import make_plan
    from server.consortium.provisioning import load_consortium

    made = make_plan(
        load_consortium(chosen.consortium),
        chosen.settings,
        chosen.out.parent,
        chosen.bank_key,
        chosen.anatomy,
    )
    _write_new(chosen.out, made.to_json(), "plan")
    say(
        console,
        f"{chosen.out}",
        f"plan {made.sha256}",
        f"{len(made.sites)} sites, {made.num_rounds} rounds; publish it with:",
        f"  meduet-server publish {chosen.out}",
    )


def _public_scans(chosen: argparse.Namespace, console: Console) -> None:
    from federation.exchanges.style_code import privacy_of
    from server.consortium.plans import plan_to_run
    from server.public_latents import plans_tokenizer
    from server.public_scans import drawn_public_scans

    plan = plan_to_run(chosen.plan)
    agreed, tokenizer = privacy_of(plan).public_sha256, plans_tokenizer(plan, chosen.tokenizer)
    if tokenizer is None:
        raise ValueError(
            "Expected the plan's tokenizer; the package's is another. Name its file: --tokenizer."
        )
    drawn = drawn_public_scans(plan, tokenizer, chosen.out)
    if drawn != agreed:
        raise ValueError(
            f"Expected the plan's public scans {agreed[:12]}…; drawn here they are {drawn[:12]}…, as on "
            "another kind of machine. Take the file that was made with the plan."
        )
    say(console, f"{chosen.out}", f"public scans {drawn}", "They are the plan's.")


def _finetuning(chosen: argparse.Namespace, console: Console) -> None:
    from server.consortium.plans import make_finetuning

    made = make_finetuning(chosen.pretrained, chosen.settings, chosen.anatomy)
    _write_new(chosen.out, made.to_json(), "fine-tuning")
    say(
        console,
        f"{chosen.out}",
        f"fine-tuning {made.sha256}",
        f"of run {made.run_sha256}, {made.rounds} rounds; publish it with:",
        f"  meduet-server publish PLAN.json --finetuning {chosen.out}",
    )


def _write_new(path: Path, text: str, what: str) -> None:
    from storage.files import write_whole

    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"Expected no other {what} at {path}; there is one. Name another file with --out.")
    write_whole(path, text)


def _publish(chosen: argparse.Namespace, console: Console) -> None:
    from server.consortium.plans import publish

    path, published = publish(chosen.plan, chosen.out, chosen.finetuning)
    say(
        console,
        f"{path}",
        f"plan {published.sha256}",
        f"code {published.bundle_sha256}",
        f"Send the file to {', '.join(published.plan.sites)}; it holds no secret. There:",
        f"  meduet-site plan show {path.name} --config site.yaml",
        f"  meduet-site plan approve {published.sha256[:12]} --config site.yaml",
    )
