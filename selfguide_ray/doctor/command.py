"""The checks in order, and what they found as JSON or as a table."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from selfguide_ray.config import Config
from selfguide_ray.doctor import Check, Finding, Patient, installation, places, reading
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import caught
from selfguide_ray.redaction import redacted
from selfguide_ray.visible import visible

CHECKS: tuple[Check, ...] = (
    Check("Python", installation.python),
    Check("packages", installation.packages),
    Check("processors", installation.processors),
    Check("threads", installation.threads),
    Check("Ray", installation.ray),
    Check("Ray's token", installation.token),
    Check("task source", places.source),
    Check("student", reading.student),
    Check("EOS", reading.ending, ("student",)),
    Check("BOS", reading.beginning, ("student",)),
    Check("chat template", reading.chat, ("student",)),
    Check("one renderer", reading.sameness, ("student",)),
    Check("special tokens", reading.escaping, ("student",)),
    Check("context", reading.context, ("student", "task source")),
    Check("run folder", places.writing),
    Check("settings", places.settings, ("student",)),
    Check("disk", places.disk, ("student", "task source")),
)
STYLES = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def examine(config: Config, checks: Sequence[Check] = CHECKS) -> list[dict[str, Any]]:
    """{check, verdict, found, advice} of each finding, in order; an error that ends a check is one of them."""
    patient, found, bad = Patient(config), [], set()
    for check in checks:
        findings: list[Finding] = []
        lacking = [name for name in check.needs if name in bad]
        if lacking:
            findings = [Finding("warning", f"Not looked at, since {lacking[0]} is wrong.", "Correct that first.")]
        else:
            with caught() as ended:
                findings.extend(check.look(patient))
            if ended.error is not None:
                findings.append(_told(ended.error))
        if any(finding.verdict == "wrong" for finding in findings):
            bad.add(check.name)
        for finding in findings:
            texts = {name: visible(redacted(text)) for name, text in finding._asdict().items()}
            found.append({"check": check.name} | texts)
    return found


def _told(error: Exception) -> Finding:
    """An error as a finding."""
    if isinstance(error, SelfGuideError):
        return Finding("wrong", f"{error.what} {error.why}", error.instead)
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Finding("wrong", told, "The check could not go on: put right what the error names.")


def exit_code(found: Sequence[dict[str, Any]]) -> int:
    """0 if nothing is wrong, else 1."""
    return int(any(finding["verdict"] == "wrong" for finding in found))


def table(found: Sequence[dict[str, Any]]) -> Table:
    """A line for each finding, what to do in the next."""
    shown = Table("check", "", "found", box=None, pad_edge=False)
    for finding in found:
        text = Text(finding["found"])
        if finding["advice"]:
            text.append(f"\n→ {finding['advice']}", "italic")
        shown.add_row(finding["check"], Text(finding["verdict"], STYLES[finding["verdict"]]), text)
    return shown
