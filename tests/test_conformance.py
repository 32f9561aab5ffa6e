"""CONFORMANCE.md leaves nothing out, and every test that it names exists."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (TESTS / "CONFORMANCE.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| [FS]\d+ \|", line)
]
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def test_all_47_capabilities_and_30_statements_have_a_row():
    assert [row[0] for row in ROWS] == [f"F{n}" for n in range(1, 48)] + [f"S{n}" for n in range(1, 31)]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_tests_that_exist_or_says_why_there_is_none(row):
    named = NAMED.findall(row[-1])
    if not named:
        assert row[-1] == ""
        assert "left out: " in row[-2]
    assert " ".join(f"`{file}::{name}`" for file, name in named) == row[-1]
    for file, name in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
