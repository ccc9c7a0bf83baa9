"""comparison.md and the numbers in it."""

from pipeline.comparison import tables
from tests.factories import FULL_RUNS, HEAD_RUNS, forty_details


def test_the_table_has_figures_with_their_uncertainty():
    text = tables.as_markdown(forty_details())
    head, *lines = text.splitlines()
    assert "on 16 test images a seed" in head
    assert "Compared on seeds 0, 1." in head
    assert "Difference from feature_extraction; p: sign-flip" in head
    assert head.endswith("p: sign-flip permutation by image, Holm-corrected.")
    assert "| strategy | n | accuracy | difference from feature_extraction | p |" in lines[1]
    baseline, full = lines[3].split(" | "), lines[4].split(" | ")
    assert baseline[:2] == ["| feature_extraction", "2"]
    assert baseline[2].startswith("77.5 ± 3.5 (")
    assert baseline[3:5] == ["", ""]
    assert full[3].startswith("+15.0 (-0.9 to +28.0)")
    assert full[-2:] == ["100", "9.5 |"]
    assert lines[6].startswith("feature_extraction over all its seeds (n = 2): accuracy 77.5 ± 3.5 (")
    assert lines[8].startswith("**Recommendation: full**")


def test_one_seed_has_no_deviation_and_a_loss_has_its_sign():
    lines = tables.as_markdown(forty_details(FULL_RUNS[:1], HEAD_RUNS[:1])).splitlines()
    assert "Compared on seed 0." in lines[0]
    assert lines[4].split(" | ")[2].startswith("90.0 (")
    assert lines[5].split(" | ")[3].startswith("-15.0 (")


def test_numbers_are_written_with_the_digits_that_are_needed():
    assert [tables.p_value(value) for value in (0.04, 0.002, 0.0004, 1.0)] == ["0.040", "0.002", "< 0.001", "1.000"]
    assert [tables.teraflops(flops) for flops in (435_806_787_365_040, 9_540_000_000_000, 15_000_000)] == [
        *("436", "9.5", "1.5e-05")
    ]


def test_the_p_values_of_the_corrected_t_test_are_named():
    found = forty_details()
    assert "corrected t" not in tables.tested(found)
    test = {**found["strategies"]["full"]["vs_baseline"]["test"], "corrected_t_p_value": 0.248}
    strategies = {**found["strategies"], "full": {**found["strategies"]["full"], "vs_baseline": {"test": test}}}
    assert tables.tested({**found, "strategies": strategies}).endswith("(Nadeau and Bengio): full 0.248.")
