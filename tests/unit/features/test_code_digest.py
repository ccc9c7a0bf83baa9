"""code_digest: the digest changes with whatever can change a row, and with no word for a reader."""

import ast
import shutil
from pathlib import Path

import pytest

from pipeline.features import code_digest
from pipeline.features.code_digest import MODULES, PIPELINE, digest_of_code

DIGESTED = sorted(path.relative_to(PIPELINE).as_posix() for pattern in MODULES for path in PIPELINE.glob(pattern))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the pipeline, which may be changed."""
    return shutil.copytree(PIPELINE, tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))


def digest(package: Path) -> str:
    digest_of_code.cache_clear()
    return digest_of_code(package)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path} has changed: {old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_copy_has_the_digest_of_the_pipeline(package: Path) -> None:
    assert digest(package) == digest_of_code()


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("features/views.py", '"flip_vertical": (True, 2)', '"flip_vertical": (True, 0)'),
        ("features/views.py", "row[:, ::-1] if is_flipped", "row[::-1] if is_flipped"),
        ("features/pixels.py", "round((n - side) / 2)", "(n - side) // 2"),
        ("features/loading.py", "offset=offset", "offset=0"),
        ("features/views.py", 'f"{augmentation.seed} {name} {k}"', 'f"{augmentation.seed}  {name} {k}"'),
        ("network/preprocessing.py", "round(255 * mean)", "round(256 * mean)"),
        ("network/preprocessing.py", "255 * torch", "256 * torch"),
        ("network/cuts.py", "return x.mean(", "return x.amax("),
        ("network/device.py", "memory_format=torch.channels_last", "memory_format=torch.contiguous_format"),
        ("network/device.py", "cudnn.allow_tf32 = False", "cudnn.allow_tf32 = True"),
        ("features/engine.py", '"fp32": "f32"', '"fp32": "bf16"'),
        ("network/backbones.py", '/ config["crop_pct"]', '* config["crop_pct"]'),
        ("dataset/decoding.py", '"white")', '"black")'),
        ("dataset/decoding.py", "6: Image.Transpose.ROTATE_270", "6: Image.Transpose.ROTATE_90"),
        ("features/extraction.py", "generator=torch.Generator().manual_seed(0)", "generator=None"),
        ("features/extraction.py", "SHARD_ROWS = 256", "SHARD_ROWS = 128"),
    ],
)
def test_a_constant_or_a_step_changes_the_digest(package: Path, module: str, old: str, new: str) -> None:
    replace(package / module, old, new)
    assert digest(package) != digest(PIPELINE)


@pytest.mark.parametrize(
    "module",
    [
        *("params.py", "logs.py", "files.py", "network/weights.py"),
        *("features/store.py", "features/shard_index.py", "features/hdf5.py"),
    ],
)
def test_what_computes_no_row_does_not_count(package: Path, module: str) -> None:
    (package / module).write_text("X = 1\n")
    assert digest(package) == digest(PIPELINE)


class OtherWords(ast.NodeTransformer):
    """Rewrites every docstring, log message and text of an error."""

    def __init__(self) -> None:
        self.n = 0

    def _reworded(self, node: ast.AST) -> None:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and len(inner.value) > 3:
                inner.value, self.n = f"other words {self.n}", self.n + 1

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant) or ast.unparse(node).startswith(("log.", "logs.log.")):
            self._reworded(node)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
            for argument in node.args:
                self._reworded(argument)
        return self.generic_visit(node)


def test_other_words_in_every_module_change_nothing(package: Path) -> None:
    for name in DIGESTED:
        tree, words = ast.parse((package / name).read_text(encoding="utf-8")), OtherWords()
        rewritten = ast.unparse(words.visit(tree))
        assert words.n, name
        (package / name).write_text(f"# without the comments there were\n{rewritten}\n", encoding="utf-8")
    assert digest(package) == digest(PIPELINE)


def test_words_that_are_added_change_nothing(package: Path) -> None:
    replace(
        package / "features/loading.py",
        "        n_waiting, largest =",
        '        """More."""\n        log.info("%s", batches)  # a comment\n        n_waiting, largest =',
    )
    replace(package / "network/flops.py", "    module.eval()\n", "    # Evaluation mode\n\n    module.eval()\n")
    replace(package / "network/device.py", '"""The context in which a forward pass has this precision."""\n    ', "")
    assert digest(package) == digest(PIPELINE)


@pytest.mark.parametrize("name", DIGESTED)
def test_no_message_is_digested(name: str) -> None:
    tree = code_digest._Wordless().visit(ast.parse((PIPELINE / name).read_text(encoding="utf-8")))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {text for text in texts if text.count(" ") > 1 and not text.startswith("II*")} == set()
