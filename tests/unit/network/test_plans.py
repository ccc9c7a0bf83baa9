"""plans: what was written is read, and a missing or damaged plan is one line with the way out."""

from pathlib import Path

import pytest

from pipeline.network import plans
from tests.factories import backbone_plan, strategy_plan


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_plans_are_read_as_they_were_written() -> None:
    base, tuned = backbone_plan(licence="apache-2.0"), strategy_plan(boundary="layer2.0.add", cached_bytes_per_image=8)
    plans.write(base, "backbone")
    plans.write(tuned, "tuned")
    assert (plans.read_backbone(), plans.read_strategy("tuned")) == (base, tuned)
    assert tuned.is_cached
    assert not strategy_plan().is_cached


@pytest.mark.parametrize(
    ("licence", "is_non_commercial"),
    [
        *(
            (name, False)
            for name in (None, "apache-2.0", "mit", "cc-by-4.0", "dinov3-license", "unknown", "apple-ascl")
        ),
        *((name, True) for name in ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "CC BY-NC 4.0", "apple-amlr", "seer-license")),
        ("fair-noncommercial-research-license", True),
        ("https://github.com/facebookresearch/SWAG/blob/main/LICENSE", True),  # of torchvision's vit_h_14
    ],
)
def test_a_licence_that_excludes_commercial_use_is_recognised(licence: str | None, is_non_commercial: bool) -> None:
    assert backbone_plan(licence=licence).is_non_commercial == is_non_commercial


def test_a_missing_plan_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^data/plan/backbone\.json: not found; run: dvc repro plan$"):
        plans.read_backbone()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"boundary": "none", "extra": 1}'])
def test_a_damaged_plan_is_one_line(content: bytes) -> None:
    plans.write(strategy_plan(), "tuned")
    Path("data/plan/tuned.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^data/plan/tuned\.json: damaged, .*; run: dvc repro plan$"):
        plans.read_strategy("tuned")
