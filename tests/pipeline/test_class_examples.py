"""Images of the classes that a gate lets through least and most."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from reports import make_gate

from seprune.data import DataSettings, open_data
from seprune.pipeline.class_examples import class_examples

CHANNELS = 4
MEANS = torch.full((10, CHANNELS), 0.5)
MEANS[3] = torch.tensor([0.9, 0.1, 0.1, 0.1])  # 0.3: the lowest, though not in its first channel
MEANS[7] = torch.tensor([0.2, 0.9, 0.9, 0.8])  # 0.7
MEANS[5] = 0.99  # no image was seen: no mean


@pytest.fixture
def gate():
    return make_gate(np.random.default_rng(0), "se", CHANNELS, depth=0.5)


def values(seen=range(10)):
    count = torch.tensor([float(n in seen and n != 5) for n in range(10)])
    return {"se": {"class_mean": MEANS, "class_count": count}}


def loader(images=60):
    return open_data("digits", DataSettings(batch_size=7)).calibration(images, seed=3)


def test_the_first_calibration_images_of_both_classes_are_shown(gate):
    given = loader()
    found = class_examples(given, list("0123456789"), values(), [gate], count=2)
    assert [(e.gate, e.end, e.name) for e in found] == [
        ("se", "lowest", "3"),
        ("se", "highest", "7"),
    ]
    assert [e.excitation for e in found] == pytest.approx([0.3, 0.7])
    pixels = torch.cat([*given.pixels()])
    labels = given.store.labels[given.rows]
    for example in found:
        own = pixels[labels == int(example.name)]
        assert len(example.images) == 2
        for text, expected in zip(example.images, own):
            image = Image.open(io.BytesIO(base64.b64decode(text)))
            assert image.format == "JPEG"
            difference = np.asarray(image).astype(int) - expected[0].numpy()
            assert np.abs(difference).mean() < 8  # JPEG at quality 85


def test_a_class_with_fewer_images_shows_those_and_one_class_alone_shows_nothing(gate):
    found = class_examples(loader(12), list("0123456789"), values(), [gate], count=5)
    assert [len(e.images) for e in found] == [1, 1]  # ten classes in turn
    assert class_examples(loader(), list("0123456789"), values([7]), [gate], count=2) == []
