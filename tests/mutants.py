"""Mutants: a solution with one small fault each, by the usual operators.

A check that lets a mutant pass either overlooks a mistake that a learner may make, or the mutant
means the same as the solution. `equivalent_mutants.json` lists the latter, each with its reason.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
COMPARISONS: dict[type[ast.cmpop], list[type[ast.cmpop]]] = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq],
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], list[type[ast.operator]]] = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div, ast.Add], ast.Div: [ast.Mult],
    ast.Pow: [ast.Mult], ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv],
    ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.MatMult: [ast.Mult],
}  # fmt: skip


def mutants(source: str) -> dict[str, str]:
    """Return name → source of every mutant of what stands between the delimiters of a cell.

    The name says what was changed: `line: before -> after`.
    """
    lines = [line.strip() for line in source.splitlines()]
    first, last = lines.index(BEGIN) + 1, lines.index(END) + 1
    tree = ast.parse(source)
    places = [n for n in ast.walk(tree) if first < getattr(n, "lineno", 0) < last]
    found: dict[str, str] = {}
    for place, node in enumerate(places):
        for after in _changes(node):
            twin = copy.deepcopy(tree)
            old = [n for n in ast.walk(twin) if first < getattr(n, "lineno", 0) < last][place]
            _Swap(old, after).visit(twin)
            name = f"{lines[node.lineno - 1]} | {ast.unparse(node)} -> {ast.unparse(after)}"
            found.setdefault(name, ast.unparse(ast.fix_missing_locations(twin)))
    return {name: text for name, text in found.items() if text != ast.unparse(tree)}


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that an operator puts in the place of this one."""
    if isinstance(node, ast.Compare):
        for kind in COMPARISONS.get(type(node.ops[0]), []):
            yield ast.Compare(node.left, [kind(), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp):
        for operator in ARITHMETIC.get(type(node.op), []):
            yield ast.BinOp(node.left, operator(), node.right)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        twin = copy.copy(node)
        twin.test = ast.UnaryOp(ast.Not(), node.test)
        yield twin
    elif isinstance(node, ast.For):
        twin = copy.copy(node)
        twin.iter = ast.List([], ast.Load())
        yield twin
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Expr | ast.If | ast.For):
        yield ast.Pass()
    if isinstance(node, ast.AugAssign):
        for operator in ARITHMETIC.get(type(node.op), []):
            yield ast.AugAssign(node.target, operator(), node.value)


def _constants(value: object) -> Iterator[ast.AST]:
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        turned = () if isinstance(value, int) else (-value,)  # dim=-1 is mostly the same as dim=1
        for other in dict.fromkeys((value + 1, value - 1, *turned, 0)):
            if other != value:
                yield ast.parse(repr(other), mode="eval").body


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    symmetric = isinstance(node.func, ast.Name) and node.func.id in ("min", "max")
    if len(node.args) >= 2 and not symmetric:  # the first two arguments swapped
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    for place in range(len(node.keywords)):  # a keyword forgotten
        kept = node.keywords[:place] + node.keywords[place + 1 :]
        yield ast.Call(node.func, node.args, kept)
    if isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name):
        yield node.func.value  # a method forgotten: x.abs() -> x
    elif isinstance(node.func, ast.Attribute) and node.func.value.id not in ("torch", "math"):  # type: ignore[attr-defined]
        yield node.func.value
    elif node.args:  # a function forgotten: sqrt(x) -> x
        yield node.args[0]
