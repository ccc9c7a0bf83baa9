"""A digest of the code that computes rows: it is in the key of the store, so that an edit makes rows be computed again.

Syntax trees are digested, so comments and line breaks do not count. Docstrings, calls of `log` and the texts of errors
are left out too: they change no row.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PIPELINE = Path(__file__).parents[1]
# Of network/, all but weights.py: the store's key has the digest of the weights that were loaded
MODULES = (
    "dataset/decoding.py",
    "network/[!w]*.py",
    "features/engine.py",
    "features/loading.py",
    "features/pixels.py",
    "features/views.py",
    "features/extraction.py",
)


@cache
def digest_of_code(package: Path = PIPELINE, modules: tuple[str, ...] = MODULES) -> str:
    """SHA-256 (hex) of `modules` of `package`, by default those that compute a row: decoding, network, views, …"""
    total = hashlib.sha256()
    for path in sorted(path for pattern in modules for path in package.glob(pattern)):
        tree = _Wordless().visit(ast.parse(path.read_text(encoding="utf-8")))
        total.update(f"{path.relative_to(package).as_posix()}\n{ast.dump(tree)}\n".encode())
    return total.hexdigest()


class _Wordless(ast.NodeTransformer):
    """Removes docstrings, calls of `log` and the arguments of errors from a syntax tree."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        match node.value:
            case ast.Constant(value=str()) | ast.Call(func=ast.Attribute(value=ast.Name(id="log"))):
                return None
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        match node.func:
            case ast.Name(id=name) if name.endswith("Error"):
                return ast.Call(node.func, [], [])
        return self.generic_visit(node)
