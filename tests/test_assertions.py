"""Nothing in the package rests on assert statements, which Python drops with -O."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tells_a_type(test: ast.expr) -> bool:
    """Whether an asserted expression only tells the type checker what no run can change."""
    match test:
        case ast.BoolOp(values=values):
            return all(map(tells_a_type, values))
        case ast.Compare(ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return not any(isinstance(node, ast.Call) for node in ast.walk(test))
        case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name() | ast.Attribute(), _]):
            return True
    return False


def list_assertions(folder: str) -> list[tuple[str, ast.expr]]:
    """Each asserted expression below a folder of the repository, with its place."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node.test)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]


def test_an_assert_statement_of_the_package_only_tells_a_type() -> None:
    """What may be wrong is refused by an `if`, which stays."""
    found = list_assertions("quantkit")
    assert len(found) > 10
    assert not [place for place, test in found if not tells_a_type(test)]


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("x is not None", True),
        ("self.x is not None and isinstance(y, dict | list)", True),
        ("x is None or isinstance(x, str)", True),
        ("x == 3", False),
        ("find(x) is not None", False),
        ("isinstance(read(), dict)", False),
        ("x", False),
    ],
)
def test_the_others_are_told_apart(text: str, harmless: bool) -> None:
    """Of what a function returns, it would have to be called."""
    assert tells_a_type(ast.parse(text, mode="eval").body) is harmless
