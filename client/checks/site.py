"""What `meduet-site check` looks at: each check says what it found and, if that will not do, what to do.

Checks read; they encode nothing and send nothing. They write the site's own tables (cohort.csv,
exclusions.csv), which name patients; what is said here are counts and row numbers, fit for a screen that
others see.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from client.books.books import open_books
from client.books.refusals import stopped_plans
from client.checks.centre import centre_check, clock_check
from client.checks.intake import (
    closing,
    cohort_lines,
    data_line,
    note_lines,
    patient_lines,
    table_lines,
)
from client.checks.machine import device_check, disk_check, folder_check, launcher_check, memory_check
from client.checks.proxies import proxy_check
from client.connection.certificate_checks import certificate_check
from client.connection.keys import SiteKeys
from client.consent.exact_sums import fewest_for_means, fewest_patients
from client.exchanges.exchange import AskRefused
from client.exchanges.latents import consent
from client.latents.cache_files import SealedFiles
from client.scans.cohort import COPY, SPLITS, Cohort
from client.scans.layouts import Found
from client.scans.names import alike
from client.settings import SiteConfig, approvals_of
from client.site import Site
from client.site_scans import SiteProgress, survey_site
from federation.bundle import running_bundle
from federation.exchanges.erasure import ERASURE
from federation.exchanges.private_rounds import mechanisms
from federation.exchanges.probes import PROBES, widest_sums
from federation.exchanges.survey import smallest_cohort
from federation.keys.certificates import utc_now
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from privacy.accounting import epsilon_of
from privacy.chain import BrokenChain
from scans.scans import Reason

Verdict = Literal["ok", "look", "failed"]
HEADROOM = 1.1
"""Free disk space asked for, over what the encodings will take."""
_EXPECTED = frozenset(
    {Reason.SIDECAR, Reason.TABLE, Reason.HIDDEN, Reason.LABEL_NOT_CHOSEN, Reason.NO_SUCH_MODALITY}
)


@dataclass(frozen=True)
class Check:
    """One thing looked at. `look`: may be meant, a person should decide. `failed`: the run will not work."""

    what: str
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do; empty when it is fine."""


@dataclass
class Seen:
    """What the checks came to know of the scans, for the last lines."""

    found: Found | None = None
    cohort: Cohort | None = None


def run_checks(
    config: SiteConfig,
    plan: RunPlan | None = None,
    progress: SiteProgress | None = None,
    seen: Seen | None = None,
) -> Iterator[Check]:
    """Look at a site, one check after another; with `plan`, also at every scan, as that plan would. The last
    say what was seen, in, left out and why, and whose it is. `seen` is filled with what was found."""
    seen, looks = seen or Seen(), []
    for check in _checks(config, plan, progress, seen):
        looks += [check.what] if check.verdict != "ok" else []
        yield check
    if seen.found is not None:
        for line in closing(seen.cohort or seen.found, seen.found.patients, looks):
            yield Check("in all", "ok", line)


def _consent(config: SiteConfig, plan: RunPlan | None) -> Check:
    """Whether anything may leave, and under a plan, whether what it asks for may."""
    ceiling = config.epsilon_ceiling
    if config.allow_non_private:
        return Check("consent", "ok", "bounded sums without differential privacy may leave")
    if not ceiling:
        advice = (
            "In site.yaml set epsilon_ceiling (3, say) for plans with noise, or set allow_non_private: true "
            "for those without, or take no part."
        )
        return Check("consent", "failed", "nothing may leave, with or without noise", advice)
    delta = config.delta_ceiling
    if plan is not None:
        released = [None] if plan.privacy is None else mechanisms(plan)
        if (asked := epsilon_of(released, delta).upper) > ceiling:
            return Check(
                "consent",
                "failed",
                f"the plan asks for epsilon {asked:.4g} (delta {delta:g}); epsilon_ceiling is {ceiling:g}",
                "This site will refuse it. Set another epsilon_ceiling in site.yaml, or take no part.",
            )
    most = f"epsilon {ceiling:g} (delta {delta:g}) for each patient"
    return Check("consent", "ok", f"only releases with noise may leave, of at most {most} over all plans")


def _checks(
    config: SiteConfig, plan: RunPlan | None, progress: SiteProgress | None, seen: Seen
) -> Iterator[Check]:
    folder = Check("folder", *folder_check(config.state_dir))
    device = (
        Check("launcher", *launcher_check(config))  # and with it goes the device
        if config.launcher
        else Check("device", *device_check(config))
    )
    yield device
    yield Check("memory", *memory_check())
    yield folder
    if folder.verdict != "failed" and plan is None:  # with a plan, when it is known what is to be encoded
        yield Check("disk space", *disk_check(config.state_dir))
    yield _consent(config, plan)
    yield from _connection(config)
    data = list(_data(config, plan, seen))
    yield from data
    if "failed" in {*(check.verdict for check in data), device.verdict, folder.verdict}:
        return
    try:
        site = Site(config)
        yield _books(config)
        yield _stopped(site)
    except BrokenChain as error:
        yield Check("ledger and journal", "failed", str(error), "Do not delete it: ask who changed it.")
        return
    try:
        yield Check("tokenizer", "ok", f"{site.tokenizer.name}, {site.tokenizer.sha256[:12]}…")
    except ValueError as error:
        yield Check("tokenizer", "failed", str(error), "Correct tokenizer in site.yaml.")
        return
    if plan is None:
        yield _approvals(config)
        return
    try:
        site.fits(plan)
        yield Check("plan", "ok", f"{plan.name}, {plan.sha256[:12]}…, lists {site.name}, same tokenizer")
    except AskRefused as error:
        yield Check("plan", "failed", str(error), _advice(plan, config))
        return
    yield Check("latents", "ok", consent(plan, config.latent_release))
    yield _approval(site, plan)
    try:
        cohort = seen.cohort = site.cohort(plan.volumes, progress, found=seen.found)
    except ValueError as error:
        yield Check("scans", "failed", str(error), "Correct data_root, layout or modality_names.")
        return
    yield from _cohort(cohort, plan, config)
    yield from (Check(*line) for line in cohort_lines(cohort, plan.volumes))
    yield _sums(cohort, plan, config)
    yield from _cache(site, cohort, plan)


def _advice(plan: RunPlan, config: SiteConfig) -> str:
    """What to do about a plan that this site does not accept."""
    try:
        consent(plan, config.latent_release)
    except AskRefused:
        assert plan.diffusion is not None
        return f"If your hospital agrees, set in site.yaml latent_release: {plan.diffusion.release.consent!r}"
    return "Ask the centre for the plan of your consortium."


def _approval(site: Site, plan: RunPlan) -> Check:
    try:
        site.accept(plan)
    except AskRefused as error:
        if error.kind is RefusalKind.OUTSIDE_HOURS:
            return Check("approval", "ok", f"approved; questions wait for {site.config.allowed_hours}")
        return Check("approval", "look", str(error), "Read it: meduet-site plan show; then plan approve.")
    implied = site.config.plan_approval == "implied"
    return Check("approval", "ok", "implied by site.yaml" if implied else "approved, with this code")


def _connection(config: SiteConfig) -> Iterator[Check]:
    """Keys, the way to the centre, and its clock."""
    if config.keys_dir is None:
        if config.plan_approval == "implied":
            yield Check("certificate", "ok", "none (no keys_dir): this site connects to no centre")
            yield Check("proxy", *proxy_check(""))
            return
        advice = "Install the start-up kit (meduet-site install) and set keys_dir in site.yaml."
        yield Check("certificate", "look", "site.yaml names no keys_dir: this site cannot connect", advice)
        yield Check("proxy", *proxy_check(""))
        return
    certificate = Check("certificate", *certificate_check(config.keys_dir, config.name, utc_now()))
    yield certificate
    if certificate.verdict != "failed":
        keys = SiteKeys.open(config.keys_dir)
        yield Check("proxy", *proxy_check(keys.connection.server))
        yield Check("centre", *centre_check(keys))
        yield Check("clock", *clock_check(keys, utc_now))


def _books(config: SiteConfig) -> Check:
    """Ledger and journal, each whole and neither older than the other. Raises `BrokenChain`."""
    books = open_books(config.state_dir)
    found = f"{len(books.ledger)} and {len(books.journal)} lines"
    if books.unnamed > 1:
        found += f"; {books.unnamed} charges of the ledger are not in the journal"
        advice = "Was an older journal put back? Compare with the centre's: meduet-server journal show."
        return Check("ledger and journal", "look", found, advice)
    return Check("ledger and journal", "ok", f"{found}, and they agree")


def _stopped(site: Site) -> Check:
    """Whether the site has stopped under a plan, as too many questions could not be answered."""
    stopped = stopped_plans(site.journal.entries())
    if not stopped:
        return Check("questions", "ok", "answered under every plan")
    named = ", ".join(f"{sha256[:12]}…" for sha256 in stopped)
    advice = (
        "Read site.log and meduet-site journal show: a fault here, or weights made to read a patient? Then "
    )
    return Check(
        "questions", "failed", f"no longer answered under {named}", advice + "meduet-site plan resume HASH."
    )


def _sums(cohort: Cohort, plan: RunPlan, config: SiteConfig) -> Check:
    """Whether the sums that the plan asks for would be of too few patients."""
    if config.allow_exact_sums:
        return Check("exact sums", "ok", "may leave over few patients, too (site.yaml: allow_exact_sums)")
    train = len(cohort.patients("train"))
    probed = train if plan.probes.patients == "train" else len(cohort.patients()) - train
    needed = {
        "site erasure": (train, fewest_for_means(plan.network.code_size), ERASURE.rounds(plan)),
        "probes": (probed, plan.probes.folds * fewest_patients(widest_sums(plan)), PROBES.rounds(plan)),
    }
    short = [
        f"{name}: {came} of {least} patients"
        for name, (came, least, asked) in needed.items()
        if asked and came < least
    ]
    if not short:
        return Check("exact sums", "ok", "none that the plan asks for would be of too few patients")
    advice = "This site is left out of these; the run goes on. To agree: allow_exact_sums in site.yaml."
    return Check("exact sums", "look", "; ".join(short), advice)


def _approvals(config: SiteConfig) -> Check:
    """Which plans this hospital has approved with the code of this machine."""
    if config.plan_approval == "implied":
        return Check("approved plans", "ok", "every plan that lists this site (site.yaml: plan_approval)")
    book = approvals_of(config)
    bundles = {one.sha256[:12]: book.approved_bundle(one.sha256) for one in book.kept()}
    approved = [sha256 for sha256, bundle in bundles.items() if bundle == running_bundle()]
    other = [sha256 for sha256, bundle in bundles.items() if bundle not in (None, running_bundle())]
    found = f"{len(approved)} with this machine's code" + "".join(f", {sha256}…" for sha256 in approved)
    if other:
        found += f"; {len(other)} with other code" + "".join(f", {sha256}…" for sha256 in other)
    if not approved:
        advice = "Ask the centre for the plan; then meduet-site plan show and plan approve."
        return Check("approved plans", "look", found, advice)
    return Check("approved plans", "ok", found)


def _data(config: SiteConfig, plan: RunPlan | None, seen: Seen) -> Iterator[Check]:
    """The data folder, by names and headers alone: what it holds, and whose."""
    try:
        found = seen.found = survey_site(config, plan.volumes if plan else None)
    except ValueError as error:
        yield Check("data folder", "failed", str(error), "Correct data_root, layout, tables or patterns.")
        return
    yield Check(*data_line(found))
    if found.candidates:
        yield from (Check(*line) for line in patient_lines(found.patients, config))
    yield from (Check(*line) for line in table_lines(found.joins, found.exclusions))
    yield from (Check(*line) for line in note_lines(found.notes))


def _cohort(cohort: Cohort, plan: RunPlan, config: SiteConfig) -> Iterator[Check]:
    counts = {split: len(cohort.patients(split)) for split in SPLITS}
    labelled = sum(scan.label_path is not None for scan in cohort.scans)
    found = (
        f"{len(cohort.scans)} scans ({labelled} labelled) of {len(cohort.patients())} patients; "
        + ", ".join(f"{split} {count}" for split, count in counts.items())
    )
    least = smallest_cohort(plan, config.minimum_cohort)
    if counts["train"] < least:
        advice = f"Statistics of fewer than {least} training patients may not leave (minimum_cohort)."
        yield Check("scans", "failed", found, f"{advice} exclusions.csv says what was left out.")
    else:
        yield Check("scans", "ok", found)
    reasons = Counter(one.reason for one in cohort.exclusions)
    listed = ", ".join(f"{reason.value} {count}" for reason, count in reasons.most_common()) or "none"
    if set(reasons) <= _EXPECTED:
        yield Check("exclusions", "ok", listed)
    else:
        yield Check("exclusions", "look", listed, "Read exclusions.csv; correct what is a mistake.")
    if duplicates := sum(one.detail == COPY for one in cohort.exclusions):
        advice = "Find them in exclusions.csv; under two names they would be two patients."
        yield Check("duplicates", "look", f"{duplicates} scans are copies of others, and excluded", advice)
    else:
        yield Check("duplicates", "ok", "none")
    yield _leakage(cohort)


def _leakage(cohort: Cohort) -> Check:
    """Is a patient, or what may be the same patient under two names, in more than one split?"""
    splits: dict[str, set[str]] = defaultdict(set)
    alike_named: dict[str, dict[str, int]] = defaultdict(dict)  # plain name -> patient -> row of cohort.csv
    for row, scan in enumerate(cohort.scans, start=2):  # row 1 is the header
        splits[scan.patient].add(scan.split)
        alike_named[alike(scan.patient)].setdefault(scan.patient, row)
    if several := sum(len(own) > 1 for own in splits.values()):
        advice = "Do not train; report this with your version of FedMeDUET."
        return Check("patients in one split", "failed", f"{several} patients are in two", advice)
    suspects = [
        rows for rows in alike_named.values() if len({next(iter(splits[patient])) for patient in rows}) > 1
    ]
    if suspects:
        pairs = "; ".join(" and ".join(map(str, rows.values())) for rows in suspects[:3])
        return Check(
            "patients in one split",
            "look",
            f"{len(suspects)} groups of names look like one patient and are in different splits "
            f"(cohort.csv, rows {pairs})",
            "If they are one, set patient_pattern so that group 1 is the same for both.",
        )
    return Check("patients in one split", "ok", "every patient is in one split only")


def _cache(site: Site, cohort: Cohort, plan: RunPlan) -> Iterator[Check]:
    try:
        sealed = isinstance(site.cache_files, SealedFiles)
    except ValueError as error:
        advice = "Correct cache_key_file or the passphrase: nothing of the cache opens without."
        yield Check("cache", "failed", str(error), advice)
        return
    try:
        state = site.cache(plan.volumes).state(cohort)
    except ValueError as error:
        yield Check("cache", "failed", str(error), "Ask the centre: the plan does not fit its tokenizer.")
        return
    found = f"{state.complete} scans encoded, {state.missing} to do" + (", encrypted" if sealed else "")
    found += f", {state.damaged} files damaged" if state.damaged else ""
    found += f", {state.unused} files that this plan does not use" if state.unused else ""
    advised = []
    if state.missing:
        advised.append(
            "`meduet-site prepare` encodes them now, reading each once more; otherwise the first round does."
        )
    if state.unused:
        advised.append("`meduet-site prepare --prune` removes what is not used.")
    yield Check("cache", "look" if advised else "ok", found, " ".join(advised))
    needed = round(HEADROOM * state.bytes_to_write)
    yield Check("disk space", *disk_check(site.state_dir, needed, state.at_least))
