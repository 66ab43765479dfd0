"""`meduet-site plan show | list | approve | withdraw | resume`: a hospital reads a plan and says yes, or no
longer.

What it does not do: any of the work; see `plan_words.py` and `approvals.py`.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from client.consent.approvals import SHORTEST
from federation.terminal import DONE, cell, say, typed
from storage.files import private_folder

if TYPE_CHECKING:
    from client.consent.approvals import Approvals
    from client.settings import SiteConfig


def add_to(commands: Any) -> None:
    """Add `plan` and its own commands to the parser of `meduet-site`."""
    about = "read a plan of the centre in plain words; approve it, or withdraw the approval"
    plan = commands.add_parser("plan", help=about, description=about.capitalize() + ".")
    actions = plan.add_subparsers(title="what to do", metavar="ACTION", required=True)
    named = "a published plan's file, or the hash of one that was shown before"
    for name, help, run, what in (
        ("show", "what will run, on which data, what will leave, in which code", _show, named),
        ("approve", "agree to a plan that was shown", _approve, "hash of the plan"),
        ("withdraw", "no longer agree to it", _withdraw, "hash of the plan"),
        ("resume", "answer again, after the site stopped and you read why", _resume, "hash of the plan"),
        ("list", "the plans that were shown, and which are approved", _list, ""),
    ):
        action = actions.add_parser(name, help=help, description=help.capitalize() + ".")
        if what:
            action.add_argument("plan", metavar="FILE|HASH" if name == "show" else "HASH", help=what)
        if name == "show":
            action.add_argument("--settings", action="store_true", help="also every setting, one per line")
        if name == "approve":
            action.add_argument(
                "--key", type=Path, metavar="FILE",
                help="the approver's key, where site.yaml names approvers; its passphrase is asked for",
            )  # fmt: skip
        action.add_argument("--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml")
        action.set_defaults(run=_at_the_site, action=run)


def _at_the_site(chosen: argparse.Namespace, console: Console) -> int:
    from client.settings import approvals_of, load_site_config

    config = load_site_config(chosen.config)
    private_folder(config.state_dir)
    status: int = chosen.action(chosen, console, config, approvals_of(config))
    return status


def _show(chosen: argparse.Namespace, console: Console, config: "SiteConfig", approvals: "Approvals") -> int:
    from client.commands.plan_words import plan_settings, plan_words
    from federation.bundle import running_bundle
    from federation.keys.key_files import read_text
    from federation.published_plan import PublishedPlan

    path = Path(chosen.plan)
    if path.is_file():
        text = read_text(path, "a published plan")
        try:
            published = PublishedPlan.from_json(text)
        except ValueError as error:
            raise ValueError(f"Expected {path} to be a published plan; {error}") from None
        approvals.keep(published)
    else:
        published = approvals.find(chosen.plan)
    for heading, sentence in plan_words(published, config.minimum_cohort):
        if heading:
            console.print(cell(heading), style="bold")
        say(console, f"  {sentence}")
    same = published.bundle_sha256 == running_bundle()
    mine = "the same code" if same else f"OTHER code ({running_bundle()[:12]}…)"
    say(console, f"This machine has {mine}.")
    if config.name not in published.plan.sites:
        say(console, f"It does not list this site ({config.name}).")
    if chosen.settings:
        say(console, *plan_settings(published))
    if approvals.approved_bundle(published.sha256) is not None:
        say(console, "Approved here.")
    else:
        say(console, f"Not approved here{_so_far(approvals, published.sha256)}.")
        key = " --key FILE" if approvals.rule.people else ""
        say(console, f"To agree: meduet-site plan approve {published.sha256[:12]}{key} --config …")
    return DONE


def _so_far(approvals: "Approvals", sha256: str) -> str:
    """Who approved yet, where more than one has to."""
    if not approvals.rule.people:
        return ""
    names = ", ".join(approvals.approvers(sha256)) or "nobody"
    return f" by enough people ({approvals.rule.needed} needed; so far {names})"


def _approve(
    chosen: argparse.Namespace, console: Console, config: "SiteConfig", approvals: "Approvals"
) -> int:
    from client.consent.approvers import read_signer
    from federation.bundle import running_bundle

    published = approvals.find(chosen.plan)
    if config.name not in published.plan.sites:
        raise ValueError(
            f"Expected a plan that lists {config.name!r}; it lists {', '.join(published.plan.sites)}."
        )
    if published.bundle_sha256 != running_bundle():
        raise ValueError(
            f"Expected a plan for the code on this machine ({running_bundle()[:12]}…); it is for "
            f"{published.bundle_sha256[:12]}…, which nobody here can have read. Install that version first."
        )
    signer = None
    if chosen.key is not None:
        passphrase = typed(console, "Passphrase of the key: ")
        signer = read_signer(chosen.key, passphrase, approvals.rule.people)
    approvals.approve(published, signer)
    who = "Approved" if signer is None else f"Approved by {signer.name}"
    say(console, f"{who}: {published.plan.name}, {published.sha256}. The book's last line: {approvals.head}")
    if approvals.approved_bundle(published.sha256) is None:
        say(console, f"It does not run yet: not approved{_so_far(approvals, published.sha256)}.")
    return DONE


def _withdraw(
    chosen: argparse.Namespace, console: Console, config: "SiteConfig", approvals: "Approvals"
) -> int:
    published = approvals.find(chosen.plan)
    if not approvals.approvers(published.sha256):
        raise ValueError(f"Expected a plan that somebody approved; nobody did {published.sha256[:12]}….")
    approvals.withdraw(published)
    say(console, f"Withdrawn: {published.plan.name}, {published.sha256}. The next question is refused;")
    say(console, f"stop meduet-site start to end one that {config.name} is answering now.")
    return DONE


def _resume(
    chosen: argparse.Namespace, console: Console, config: "SiteConfig", approvals: "Approvals"
) -> int:
    from client.books.books import JOURNAL
    from client.books.refusals import resume, stopped_plans
    from federation.journal import Journal

    journal = Journal(config.state_dir / JOURNAL)
    found = [sha256 for sha256 in stopped_plans(journal.entries()) if sha256.startswith(chosen.plan)]
    if len(chosen.plan) < SHORTEST or len(found) != 1:
        raise ValueError(
            f"Expected the hash ({SHORTEST} digits or more) of a plan under which this site stopped; got "
            f"{chosen.plan[:80]!r}. meduet-site check lists them."
        )
    resume(journal, found[0])
    say(console, f"Questions of plan {found[0][:12]}… are answered again.")
    return DONE


def _list(chosen: argparse.Namespace, console: Console, config: "SiteConfig", approvals: "Approvals") -> int:
    from federation.bundle import running_bundle

    shown = list(approvals.kept())
    for published in shown:
        bundle = approvals.approved_bundle(published.sha256)
        state = f"not approved{_so_far(approvals, published.sha256)}" if bundle is None else "approved"
        if bundle is not None and bundle != running_bundle():
            state = "approved for other code than this machine's"
        kind = "run" if published.finetuning is None else "fine-tuning"
        say(console, f"{published.sha256[:12]}  {state:<13} {kind} {published.plan.name}")
    if not shown:
        say(console, f"No plan was shown yet at {config.name}: meduet-site plan show FILE --config …")
    return DONE
