"""What is kept, what is rejected, and what is there twice."""

from base64 import b64encode

import numpy as np
import pandas as pd

from pipeline.ingest.indexing import NO_IMAGE, Inspected
from pipeline.ingest.inventory import Inventory, take
from pipeline.ingest.listing import OPTIONAL, Listing

SIZE = ("L", "30", "20", "1")


def taken(
    *entries: tuple[str, str, Inspected], correlation: float = 0.997, min_class_size: int = 1, is_table: bool = False
) -> Inventory:
    frame = pd.DataFrame([(path, label) for path, label, _ in entries], columns=["path", "label"]).assign(**OPTIONAL)
    listing = Listing(frame, [("z", "is a pipe; expected a file")], ["left out"], is_table=is_table)
    return take(listing, [inspected for *_, inspected in entries], correlation, min_class_size)


def image(sha256: str, degrees: float | None = None, kind: str = "PNG") -> Inspected:
    """An image whose signature points in this direction; a flat one by default."""
    if degrees is None:
        return Inspected("", sha256, kind, *SIZE, "")
    signature = np.zeros(63, np.int16)
    signature[:2] = np.round(32767 * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]))
    return Inspected("", sha256, kind, *SIZE, b64encode(signature.tobytes()).decode())


BAD = Inspected("empty file", "0")


def test_what_is_read_is_kept_and_what_is_not_is_rejected_beside_what_was_listed():
    found = taken(("a.png", "cat", image("1")), ("b.png", "dog", BAD), ("c.png", "dog", image("2")))
    assert list(found.kept["path"]) == ["a.png", "c.png"]
    assert found.unreadable == [("b.png", "empty file"), ("z", "is a pipe; expected a file")]
    assert found.conflicts == []
    assert found.summary == {
        "n_images": 2,
        "n_rejected": 2,
        "n_skipped": 0,
        "skipped": {},
        "n_distinct": 2,
        "classes": {"cat": 1, "dog": 1},
        "width": {"min": 30, "median": 30.0, "max": 30},
        "height": {"min": 20, "median": 20.0, "max": 20},
        "formats": {"PNG": 2},
        "modes": {"L": 2},
        "orientations": {"1": 2},
        "exact_duplicates": [],
        "n_exact_duplicates": 0,
        "conflicts": [],
        "n_near_duplicates": 0,
        "n_poor": {},
        "poor": {},
        "warnings": ["left out"],
    }


def test_equal_bytes_of_one_label_are_kept_and_listed():
    found = taken(*((f"{n}.png", "cat", image("1", 5)) for n in range(3)), ("x.png", "cat", image("2", 90)))
    assert found.summary["exact_duplicates"] == [["0.png", "1.png", "2.png"]]
    assert found.summary["n_exact_duplicates"] == 2
    assert len(found.kept) == 4


def test_all_images_of_equal_bytes_and_different_labels_are_rejected():
    found = taken(
        ("a.png", "cat", image("1")),
        ("b.png", "cat", image("2")),
        ("c.png", "dog", image("1")),
        ("d.png", "cat", image("1")),
    )
    assert list(found.kept["path"]) == ["b.png"]
    assert found.summary["conflicts"] == [["a.png", "c.png", "d.png"]]
    assert dict(found.conflicts) == {
        "a.png": "labelled 'cat', but 'c.png' with the same bytes 'dog'",
        "c.png": "labelled 'dog', but 'a.png' with the same bytes 'cat'",
        "d.png": "labelled 'cat', but 'c.png' with the same bytes 'dog'",
    }
    assert not set(found.conflicts) & set(found.unreadable)


def test_near_duplicates_are_listed_in_pairs_and_grouped_with_their_copies():
    found = taken(
        ("a.png", "cat", image("1", 0)),
        ("b.png", "dog", image("2", 4)),
        ("c.png", "cat", image("1", 0)),  # a copy of a
        ("d.png", "cat", image("3", 90)),  # far from all
        ("e.png", "cat", image("4")),  # flat
        ("f.png", "cat", image("5", 92)),
        ("g.png", "cat", image("4")),
        correlation=float(np.cos(np.radians(5))),
    )
    assert found.near_duplicates.to_dict("list") == {
        "a": ["d.png", "a.png"],
        "b": ["f.png", "b.png"],
        "correlation": [0.9994, 0.9976],
    }
    assert found.summary["n_near_duplicates"] == 2
    assert list(found.kept["near_duplicate_group"]) == ["near_1", "near_1", "near_1", "near_3", "", "near_3", ""]
    (warning,) = found.summary["warnings"][1:]
    assert warning == "1 of 2 pairs of near-duplicates are labelled differently, first a.png (cat) and b.png (dog)"


def test_files_with_the_extension_of_another_format_are_named_and_kept():
    found = taken(
        ("a.png", "cat", image("1", kind="JPEG")),
        ("b.JPG", "cat", image("2", kind="JPEG")),
        ("c.jpg", "cat", image("3", kind="MPO")),
        ("d", "cat", image("4", kind="GIF")),
        ("e.exe", "cat", image("5")),
    )
    assert len(found.kept) == 5
    assert found.summary["warnings"][1:] == ["2 files have the extension of another format: a.png (JPEG), e.exe (PNG)"]


def test_a_summary_of_nothing_is_a_summary():
    found = taken(("a.png", "cat", BAD))
    assert (found.summary["n_images"], found.summary["width"], list(found.kept["near_duplicate_group"])) == (0, {}, [])


def other(reason: str = "not an image of a known format") -> Inspected:
    return Inspected(reason, "0", NO_IMAGE)


def test_files_that_claim_no_image_format_are_left_out_and_counted_by_extension():
    entries = [(f"{n}.png", "cat", image(str(n))) for n in range(4)]
    entries += [(f"{n}.XML", "cat", other()) for n in range(3)] + [("0.png:Zone.Identifier", "cat", other())]
    entries += [("README", "cat", other()), ("empty", "cat", other("empty file"))]
    bad = [("b.png", "cat", other()), ("c.heic", "cat", other()), ("d.txt", "cat", BAD), ("e.bin", "cat", BAD)]
    found = taken(*entries, *bad)
    assert found.summary["skipped"] == {"no images": 6}
    assert found.summary["n_skipped"] == 6
    assert [path for path, _ in found.unreadable] == ["b.png", "c.heic", "d.txt", "e.bin", "z"]
    left_out = "6 files that are no images were left out: .xml (3), no extension (2), .identifier (1)"
    assert left_out in found.summary["warnings"]
    assert found.other_files == {"cat": {".xml": 3, ".identifier": 1, "no extension": 2}}


def test_an_extension_that_most_readable_files_have_is_one_of_images():
    entries = [(f"{n}.001", "cat", image(str(n))) for n in range(3)]
    found = taken(*entries, ("8.001", "cat", other()), ("9.001", "cat", other("empty file")), ("x.002", "cat", other()))
    assert [path for path, _ in found.unreadable] == ["8.001", "9.001", "z"]
    assert found.summary["n_skipped"] == 1


def test_what_a_table_lists_is_rejected_and_not_left_out():
    found = taken(("a.png", "cat", image("1")), ("a.txt", "cat", other()), is_table=True)
    assert [path for path, _ in found.unreadable] == ["a.txt", "z"]
    assert found.summary["n_skipped"] == 0


def test_classes_that_are_too_small_are_rejected_with_their_size():
    entries = [(f"{n}.png", "cat", image(str(n))) for n in range(3)]
    found = taken(*entries, ("o.png", "owl", image("8")), ("p.png", "owl", BAD), min_class_size=2)
    assert set(found.kept["label"]) == {"cat"}
    assert found.few == [("o.png", "of class 'owl', which has 1 images")]
    assert found.small == {"owl": 1}
    assert found.summary["n_rejected"] == 3
    assert (
        "1 classes with fewer images than dataset.min_class_size (2) were left out: owl (1)"
        in found.summary["warnings"]
    )


def test_images_that_may_show_nothing_are_listed_and_counted():
    def shown(name: str, look: str = "", sharpness: str = "0.3", side: str = "200") -> tuple[str, str, Inspected]:
        return name, "cat", image(name)._replace(look=look, sharpness=sharpness, width=side, height="300")

    good = [shown(f"good{n}.png") for n in range(6)]
    found = taken(
        *good,
        shown("black.png", "flat", ""),
        shown("deep.png", "few levels"),
        shown("night.png", "dark", "0.001"),
        shown("soft.png", sharpness="0.0123"),
        shown("soft enough.png", sharpness="0.0212"),
        shown("small.png", side="33"),
        shown("dot.png", sharpness="", side="3"),
    )
    assert len(found.kept) == 13
    assert found.summary["poor"] == {
        "of one colour": ["black.png"],
        "with few of the grey levels of their 16 bits (scale them to the full range)": ["deep.png"],
        "of a few pixels, or far smaller than the others": ["small.png", "dot.png"],
        "almost black": ["night.png"],
        "far less sharp than the others": ["soft.png"],
    }
    assert list(found.summary["n_poor"].values()) == [1, 1, 2, 1, 1]
    assert "2 images are of a few pixels, or far smaller than the others, first small.png" in found.summary["warnings"]


def test_a_set_of_soft_images_has_no_blurred_ones():
    found = taken(*((f"{n}.png", "cat", image(str(n))._replace(sharpness=f"0.00{n}")) for n in range(3, 9)))
    assert found.summary["n_poor"] == {}


def test_classes_that_differ_in_the_format_of_their_files_are_a_warning():
    found = taken(("a.png", "cat", image("1")), ("b.jpg", "dog", image("2", kind="JPEG")), ("c.png", "cat", image("3")))
    expected = "the format of the files depends on the class (cat PNG, dog JPEG): a network may learn it instead"
    assert found.summary["warnings"][1:] == [expected]
    found = taken(("a.png", "cat", image("1")), ("b.jpg", "dog", image("2", kind="JPEG")), ("c.png", "dog", image("3")))
    assert found.summary["warnings"][1:] == []
