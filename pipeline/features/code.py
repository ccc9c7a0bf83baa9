"""A digest of the code that computes features: with it in the key of the store, an edit makes the rows be recomputed.

What is digested are the syntax trees, so comments and line breaks do not count. Docstrings and the texts of errors and
log messages are left out too: they change no value.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PIPELINE = Path(__file__).parents[1]
MODULES = ("dataset/decoding.py", "network/*.py", "features/views.py", "features/extraction.py")


@cache
def digest_of_code() -> str:
    """SHA-256 (hex) of the modules that compute a row: decoding, the network, views and extraction."""
    paths = sorted(path for pattern in MODULES for path in PIPELINE.glob(pattern))
    total = hashlib.sha256()
    for path in paths:
        total.update(
            f"{path.relative_to(PIPELINE).as_posix()}\n{_without_words(path.read_text(encoding='utf-8'))}\n".encode()
        )
    return total.hexdigest()


def _without_words(source: str) -> str:
    """The syntax tree as text, without docstrings and the texts of errors and log messages."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body[0] = ast.Pass()
        elif isinstance(node, ast.Raise) or _is_log_call(node):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    inner.value = ""
    return ast.dump(tree)


def _is_log_call(node: ast.AST) -> bool:
    """Whether it is log.info(…), logs.log.warning(…), and so on."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="log") | ast.Attribute(attr="log"))):
            return True
    return False
