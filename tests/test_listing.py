"""A listing gives each sample in order with a key of its own, in little memory."""

import random
import tracemalloc
from pathlib import Path

import pytest

from vir.data.sources.listing import WHOLE, Image, Listing, Sample, make_key
from vir.errors import DataError


def source(classes, *, files=("x.tar",), sized=True, flat=False, class_in_key=True):
    """From {class: [name or Image]}."""
    listing = Listing({name: label for label, name in enumerate(classes)}, files=files, sized=sized, flat=flat)
    for name, images in classes.items():
        listing.add(name, [image if isinstance(image, Image) else Image(image) for image in images], class_in_key)
    return listing.source("test", Path("root"), tuple(classes), 3)


def naive_keys(classes, class_in_key=True):
    taken = set()
    for class_name, names in classes.items():
        for name in sorted(names):
            key = base = make_key(class_name, name, class_in_key)
            number = 0
            while key in taken:
                number += 1
                key = f"{base}-{number}"
            taken.add(key)
            yield key


ADVERSARIAL = [
    {"a": ["1.jpg", "1.png", "1.webp", "1-1.jpg", "1-2.jpg", "1-1.png"]},
    {"a": ["1-1-1.jpg", "1-1.jpg", "1-1.png", "1.jpg", "1.png", "1.webp", "1.jpeg"]},
    {"a": ["b_c.jpg"], "a_b": ["c.jpg", "c-1.jpg", "c-1.png"], "a_b_c": [".jpg", "-1.jpg"]},
    {"a": ["x.y.jpg", "x_y.jpg", "x\\y.jpg", "x\ny.jpg", "x\x7fy.jpg", "x_y-1.jpg", "x_y-3.jpg"]},
    {"a": [f"x{'-1' * depth}.{ending}" for depth in range(8) for ending in ("jpg", "png")]},
    {"a": [], "b": ["1.jpg"], "c": [], "d": []},
]


@pytest.mark.parametrize("class_in_key", [True, False])
@pytest.mark.parametrize("classes", ADVERSARIAL)
def test_keys_are_made_unique_as_a_set_of_all_keys_would_do_it(classes, class_in_key):
    found = [sample.key for sample in source(classes, class_in_key=class_in_key).samples]
    assert found == list(naive_keys(classes, class_in_key)) and len(set(found)) == len(found)


@pytest.mark.parametrize("seed", range(20))
def test_keys_of_random_names_are_unique_too(seed):
    draw = random.Random(seed)
    classes = {name: list({"".join(draw.choices(["a", "_", "-1", "-2", "."], k=draw.randrange(1, 6))) + ending
                           for ending in draw.choices([".jpg", ".png", ".webp"], k=60)})
               for name in ("a", "a-1", "a_a", "b")}
    found = [sample.key for sample in source(classes).samples]
    assert found == list(naive_keys(classes)) and len(set(found)) == len(found) > 100


def test_samples_tell_where_their_bytes_are():
    images = {"a": [Image("2.jpg", 1, 512, 7), Image("1.jpg", 0, 2 ** 40, 0)], "b": [Image("a_1.png", 1, 5, 2 ** 33)]}
    assert list(source(images, files=("x.tar", "y.tar")).samples) == [
        Sample("a_1", 0, "a/1.jpg", "x.tar", 2 ** 40, 0), Sample("a_2", 0, "a/2.jpg", "y.tar", 512, 7),
        Sample("b_a_1", 1, "b/a_1.png", "y.tar", 5, 2 ** 33)]
    assert list(source({"a": ["1.jpg"]}, files=(), sized=False).samples) == [
        Sample("a_1", 0, "a/1.jpg", "a/1.jpg", 0, WHOLE)]
    flat = source({"a": [Image("1.jpg", size=4)]}, files=(), flat=True)
    assert list(flat.samples) == [Sample("a_1", 0, "a/1.jpg", "1.jpg", 0, WHOLE)]
    assert (flat.sizes.sum(), flat.ignored, flat.classes, flat.kind) == (4, 3, ("a",), "test")
    assert source(images, files=("x.tar", "y.tar")).sizes.sum() == 2 ** 33 + 7
    with pytest.raises(IndexError):
        flat.samples[1]


def test_a_key_that_is_told_stays_unless_another_has_it():
    keys = {"1.jpg": None, "1.png": "a_1-7", "2.jpg": "a_1-7", "3.jpg": "a_1"}
    images = {"a": [Image(name, key=key) for name, key in keys.items()]}
    assert [sample.key for sample in source(images).samples] == ["a_1", "a_1-7", "a_1-7-1", "a_1-1"]


def test_some_classes_may_have_keys_without_their_name():
    listing = Listing({"a": 0, "b": 1})
    listing.add("a", [Image("1.jpg")])
    listing.add("a", [Image("2.jpg")], class_in_key=False)
    listing.add("b", [Image("b_3.jpg")])
    assert [(sample.key, sample.filename) for sample in listing.source("x", Path("."), ("a", "b"), 0).samples] == [
        ("a_1", "a/1.jpg"), ("2", "a/2.jpg"), ("b_3", "b/b_3.jpg")]


def test_the_fingerprint_tells_every_change_and_nothing_else():
    base = {"a": [Image("1.jpg", 0, 0, 5), Image("2.jpg", 0, 8, 5)], "b": [Image("3.jpg", 1, 0, 5)]}
    files = ("x.tar", "y.tar")
    changed = [
        source(base, files=files),
        source({"a": base["a"], "c": base["b"]}, files=files),                    # a class
        source({"b": base["a"], "a": base["b"]}, files=files),                    # labels
        source({"a": base["a"][:1], "b": base["b"]}, files=files),                # an image less
        source({"a": [*base["a"], *base["b"]], "b": []}, files=files),            # an image in another class
        source({"a": [base["a"][0]._replace(name="0.jpg"), base["a"][1]], "b": base["b"]}, files=files),
        source({"a": [base["a"][0]._replace(size=6), base["a"][1]], "b": base["b"]}, files=files),
        source({"a": [base["a"][0]._replace(offset=1), base["a"][1]], "b": base["b"]}, files=files),
        source({"a": [base["a"][0]._replace(file=1), base["a"][1]], "b": base["b"]}, files=files),
        source({"a": [base["a"][0]._replace(key="k"), base["a"][1]], "b": base["b"]}, files=files),
        source({"a": base["a"], "b": base["b"], "d": []}, files=files),
        source(base, files=("x.tar", "z.tar")),
        source(base, files=files, class_in_key=False),
        source({"a": [Image("1.jpg2.jpg", 0, 0, 5)], "b": base["b"]}, files=files),
    ]
    assert len({one.fingerprint for one in changed}) == len(changed)
    again = source({"a": base["a"][::-1], "b": base["b"]}, files=files)
    assert again.fingerprint == changed[0].fingerprint


@pytest.mark.parametrize("class_name, image, message", [
    ("z", "1.jpg", "the class list of 1 classes lacks 'z'; give the right list with --classes"),
    ("a", "é" * 50 + ".jpg", "makes a key of 102 bytes, the limit is 100; rename the file"),
    ("a", "\udcff.jpg", "is not UTF-8; rename the file"),
])
def test_what_cannot_be_listed_is_refused(class_name, image, message):
    listing = Listing({"a": 0})
    with pytest.raises(DataError, match=message):
        listing.add(class_name, [Image(image)])


def test_a_sample_takes_less_than_100_bytes_of_memory():
    per_class, classes = 1000, [f"n{i:08d}" for i in range(200)]
    ending = ("JPEG", "PNG")
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    listing = Listing({name: label for label, name in enumerate(classes)}, files=("x.tar",), sized=True)
    for name in classes:
        listing.add(name, (Image(f"{name}_{i // 2 if i < 20 else i}.{ending[i % 2]}", 0, i << 20, i)
                           for i in range(per_class)))
    made = listing.source("test", Path("root"), tuple(classes), 0)
    del listing
    after, peak = (value - before for value in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    count = per_class * len(classes)
    assert len(made.samples) == count and made.samples[3].key == "n00000000_1-1"
    assert peak < 100 * count and after < 60 * count, (peak / count, after / count)
