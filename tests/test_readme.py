"""What the README says of the code is true."""

import ast
import re
from pathlib import Path

from selfguide_ray.config_file import fields

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(heading):
    """Cells of the first table below a heading."""
    section = "\n" + README.split(f"## {heading}\n", 1)[1]
    table = section[section.index("\n| ") + 1 :].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_the_table_of_settings_says_what_the_code_says():
    told = [(name.strip("`"), default.strip("`"), meaning) for name, default, meaning in rows("Settings")]
    known = [(name, default, meaning.replace("|", "\\|")) for name, default, meaning in fields()]
    assert told == [row for row in known if row in told]
    assert len(told) > 25


def test_the_tour_names_every_module_with_its_length():
    told = {}
    for names, lengths, _ in rows("Code tour"):
        told |= dict(zip(re.findall(r"`([^`]+)`", names), map(int, lengths.split(" + ")), strict=True))
    package = ROOT / "selfguide_ray"
    there = {str(p.relative_to(package)): p for p in [*package.rglob("*.py"), *package.glob("*.j2")]}
    there.pop("__init__.py")
    assert told == {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in there.items()}


def test_every_path_in_the_readme_exists():
    named = re.findall(r"`((?:jobs|configs|tests|docs|selfguide_ray|engine)/[\w./-]*)`", README)
    assert len(named) > 5
    places = (ROOT, ROOT / "selfguide_ray")
    assert [
        name for name in named if name != "jobs/mine.py" and not any((place / name).exists() for place in places)
    ] == []


def test_it_is_short_and_its_first_command_is_near():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert "make quickstart" in "\n".join(lines[:20])


def test_whatever_is_public_has_a_docstring():
    def public(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield prefix + node.name, ast.get_docstring(node)
                if isinstance(node, ast.ClassDef):
                    yield from public(node.body, f"{prefix}{node.name}.")

    files = (ROOT / "selfguide_ray").rglob("*.py")
    told = [
        pair for path in files for pair in public(ast.parse(path.read_text(encoding="utf-8")).body, f"{path.name}:")
    ]
    assert [name for name, docstring in told if docstring is None] == []
