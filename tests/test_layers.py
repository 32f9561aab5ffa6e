"""The imports run one way, and two files know Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "selfguide_ray"

ENGINE = [
    "sampling", "labels", "attention", "prefixes", "rows", "adapters", "batching", "cached", "trial", "turns",
    "transformers", "vllm", "vllm_requests", "vllm_settings", "scripted",
]  # fmt: skip
TUNING = [
    "pairs", "base", "last_layer", "layout", "adapter_stack", "side_by_side", "zero", "sharded_state", "data_parallel",
    "scripted",
]  # fmt: skip
TEXTS = ["voices", "prompts", "filters", "metrics", "similarity", "contamination"]
# From the bottom up; a module imports from lower rows only. A row marked "apart" holds modules that never meet.
LAYERS = [
    (
        "vocabulary",
        ["errors", "visible", "redaction", "documents", "embedded", "schema", "sections", "config", "config_file"],
    ),
    ("files", ["storage", "run", "student", "task_files", "failures", "lease", "spending", "status"]),
    ("tools", ["engine", *(f"engine.{name}" for name in ENGINE), *TEXTS, "reference", "votes", "guarding", "metering"]),
    ("boards", ["standings", "significance", "suspects", "comparison", "charts"]),
    (
        "under the tables",
        ["tuning", *(f"tuning.{name}" for name in TUNING), "baselines", "sifting", "tuned", "verification"],
    ),
    ("tables, apart", ["tasks", "inputs", "outputs", "trainset", "models", "predictions", "scores", "report"]),
    (
        "students",
        ["pretraining", "pretraining.made_up", "pretraining.corpus", "pretraining.muon", "pretraining.learning"],
    ),
    ("searches", ["search", "search.selection"]),
    ("before and after a run", ["estimate", "planning"]),
    ("told", ["progress", "stopping"]),
    ("ray", ["executor", "trainer"]),
    (
        "top",
        [
            "search.sharing",
            "search.walk",
            "search.command",
            "search.ablation",
            "method",
            "submit",
            "doctor",
            "doctor.installation",
            "doctor.reading",
            "doctor.places",
            "doctor.command",
            "cli",
            "pretraining.recipe",
            "pretraining.command",
        ],
    ),
]
RANK = {module: rank for rank, (_, modules) in enumerate(LAYERS) for module in modules}
APART = {"tables, apart"}
KNOW_RAY = {"executor", "trainer"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def first_party(path: Path) -> set[str]:
    return {
        name.removeprefix("selfguide_ray.") for name in imports(path) if name.removeprefix("selfguide_ray.") in RANK
    }


def test_every_module_has_its_layer():
    assert set(modules()) == set(RANK)


@pytest.mark.parametrize("module", sorted(RANK))
def test_a_module_imports_from_its_own_layer_or_lower_ones(module):
    upward = {other for other in first_party(modules()[module]) if RANK[other] > RANK[module]}
    assert not upward


@pytest.mark.parametrize("module", [m for name, row in LAYERS if name in APART for m in row])
def test_tables_never_import_each_other(module):
    sideways = {other for other in first_party(modules()[module]) if RANK[other] == RANK[module]}
    assert not sideways


def test_only_two_files_import_ray():
    knowing = {
        name for name, path in modules().items() if any(i == "ray" or i.startswith("ray.") for i in imports(path))
    }
    assert knowing == KNOW_RAY


def test_there_is_one_except_exception():
    found = [
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert found == ["failures"]


def test_help_starts_neither_ray_nor_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from selfguide_ray.cli import app;"
        "r = CliRunner().invoke(app, ['run', '--help']); assert r.exit_code == 0, r.output;"
        "print([m for m in ('ray', 'torch', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_entry_scripts_are_short_and_open_with_their_command():
    for path in (PACKAGE.parent / "jobs").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        assert f"python jobs/{path.name}" in docstring, path
        if path.name != "benchmark.py":
            assert len(text.splitlines()) <= 35, path
