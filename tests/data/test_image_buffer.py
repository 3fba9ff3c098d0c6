"""Images from a real folder wait as bytes, and are decoded beside what is computed with them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from seprune.data import DataSettings, open_data
from seprune.data.image_buffer import WaitingImages, unchanged, wait_for
from seprune.errors import InputError
from seprune.graph.groups import find_structure
from seprune.pruning.plan import plan_of
from seprune.pruning.prune import prune
from seprune.recovery.refit import RefitOptions, refit
from seprune.runtime.threads import usable_cores
from seprune.statistics.calibration_inputs import take_inputs

COUNT, BATCH = 300, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 PNG files in two classes, and some in val/."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(COUNT + 4):
        split = "train" if number < COUNT else "val"
        place = root / split / f"class{number % 2}" / f"{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place)
    return root


def loader(folder: Path, workers: int | None) -> object:
    settings = DataSettings(
        cache="none", workers=workers, batch_size=BATCH, validation=0, input=(3, 8, 8)
    )
    return open_data(str(folder), settings).calibration(COUNT, seed=0)


def test_images_of_files_wait_as_bytes_and_as_many_workers_decode_as_there_are_cores(folder):
    given = loader(folder, None)
    inputs = take_inputs(given, COUNT, memory=1 << 30)
    assert isinstance(inputs.kept, WaitingImages)
    assert inputs.kept.kept.dtype == torch.uint8
    assert inputs.kept.arriving is not None
    assert inputs.kept.arriving.column.done == BATCH  # the others are under way
    assert len(multiprocessing.active_children()) == usable_cores()
    wanted = torch.cat([batch for batch, _ in given])
    assert torch.equal(inputs.part(0, COUNT), wanted)
    assert inputs.kept.arriving.column.done == COUNT


def test_the_first_forwards_run_before_the_last_image_is_decoded(folder):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            reached.append(len(decoded))
            return self.second(self.first(x))

    reached, decoded = list[int](), list[int]()
    torch.manual_seed(0)
    model = Net().eval()
    groups = find_structure(model, torch.randn(2, 3, 8, 8)).groups
    plan = plan_of(groups, {g.name: range(g.units // 2) for g in groups if g.prunable}, {})
    small, options = prune(model, plan), RefitOptions(images=COUNT, device="cpu")
    given = loader(folder, 0)
    whole, read = torch.cat([batch for batch, _ in given]), given.store._images
    reached.clear()

    class Counting:
        labels = read.labels

        def __call__(self, row: int) -> Image.Image:
            decoded.append(row)
            return read(row)

    given.store._images = Counting()
    found = refit(model, small, plan, given, options=options)
    assert len(decoded) == COUNT  # each once
    assert reached[0] < COUNT / 2
    same = refit(model, small, plan, [whole], options=options)
    assert found.errors == same.errors
    assert torch.equal(found.model.second.weight, same.model.second.weight)


def test_a_loader_with_fewer_images_than_it_says_is_an_error():
    images = wait_for([torch.rand(3, 2), torch.rand(4, 2)], 9, memory=1000, finish=unchanged)
    assert images.part(0, 7).shape == (7, 2)
    with pytest.raises(InputError, match="the loader ended after 7 images") as caught:
        images.rows([1, 8])
    assert "it says that it has 9 of them" in str(caught.value)
