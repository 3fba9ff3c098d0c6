"""Folders with masks, boxes and tables, the drawn shapes, and images changed with their targets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import seprune
from seprune.data import Augment, DataSettings, open_data
from seprune.data.joint import transform, wrapped
from seprune.data.shapes import SHAPES, Drawn
from seprune.data.sources import open_source
from seprune.errors import InputError
from seprune.tasks import Detection, MultiLabel, Regression, Segmentation

PLAIN = DataSettings(augment="none", workers=0, batch_size=8)


def picture(number, size=(12, 16)):
    values = np.random.default_rng(number).integers(0, 256, (*size, 3))
    return Image.fromarray(values.astype(np.uint8))


def mask_of(number, size=(12, 16), classes=3):
    return np.random.default_rng(100 + number).integers(0, classes, size).astype(np.uint8)


def paired(root, count=10, *, form="L", images="images", masks="masks"):
    for number in range(count):
        for folder in (images, masks):
            (root / folder).mkdir(parents=True, exist_ok=True)
        picture(number).save(root / images / f"{number:02}.png")
        values = mask_of(number)
        mask = Image.fromarray(values if form != "P" else values[:, :, None].repeat(3, 2))
        if form == "P":
            mask = Image.fromarray(values, "P")
            mask.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
        mask.save(root / masks / f"{number:02}.png")
    return root


@pytest.mark.parametrize("name", ["valid", "test"])
def test_masks_and_tables_are_reported_on_under_other_names(tmp_path, name):
    for part, count in (("train", 4), (name, 3)):
        paired(tmp_path / "masks" / part, count)
        (tmp_path / "table").mkdir(exist_ok=True)
        lines = [f"{part}-{n}.png,{n}" for n in range(count)]
        for n in range(count):
            picture(n).save(tmp_path / "table" / f"{part}-{n}.png")
        (tmp_path / "table" / f"{part}.csv").write_text("\n".join(["image,size", *lines]))
    for folder in ("masks", "table"):
        data = open_data(str(tmp_path / folder), PLAIN)
        assert (data.info.training + data.info.validation, data.info.reporting) == (4, 3)
        assert not any("set aside" in note for note in data.info.notes)


def expected(number):
    return torch.from_numpy(mask_of(number).astype(np.int64))


@pytest.mark.parametrize("form", ["L", "P"])
def test_images_beside_masks_are_split_by_a_seed_and_never_read_as_classes(tmp_path, form):
    data = open_data(str(paired(tmp_path, form=form)), PLAIN)
    assert data.info.task == "segmentation"
    assert isinstance(data.task, Segmentation)
    assert data.info.classes == ("0", "1", "2")
    assert data.info.preprocessing.shape == (3, 12, 16)
    assert (data.info.training, data.info.validation, data.info.reporting) == (7, 1, 2)
    assert "2 of 10, 20% of them by a seed, are set aside" in data.info.notes[0]
    again = open_data(str(tmp_path), PLAIN)
    seen = [y for loader in (data.reporting(), again.reporting()) for _, y in loader]
    assert torch.equal(seen[0], seen[1])
    given = {expected(n).numpy().tobytes() for n in range(10)}
    parts = (data.reporting(), data.validation(), data.calibration(99))
    found = [mask.numpy().tobytes() for part in parts for _, y in part for mask in y]
    assert len(found) == 10
    assert set(found) == given


def test_parts_of_their_own_and_names_of_classes_are_kept(tmp_path):
    for part in ("train", "val"):
        paired(tmp_path / part, 3)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    data = open_data(str(tmp_path), PLAIN)
    assert data.info.classes == ("sky", "road", "car", "tree")
    assert (data.info.training + data.info.validation, data.info.reporting) == (3, 3)
    images, masks = next(iter(data.reporting()))
    assert torch.equal(masks[1], expected(1))
    pixels = np.asarray(picture(1)).transpose(2, 0, 1) / 255
    mean, std = (
        np.array(v)[:, None, None]
        for v in (data.info.preprocessing.mean, data.info.preprocessing.std)
    )
    assert np.allclose(images[1].numpy(), (pixels - mean) / std, atol=1e-5)


def test_pascal_voc_is_read_by_its_lists(tmp_path):
    paired(tmp_path, 6, images="JPEGImages", masks="SegmentationClass", form="P")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("00\n02\n03\n")
    (lists / "val.txt").write_text("05\n")
    data = open_data(str(tmp_path), DataSettings(workers=0, validation=0))
    assert (data.info.training, data.info.reporting) == (3, 1)
    assert torch.equal(next(iter(data.reporting()))[1][0], expected(5))
    (lists / "val.txt").write_text("05\n09\n")
    with pytest.raises(InputError, match=r"val\.txt: image 09 is not in") as caught:
        open_data(str(tmp_path))
    assert caught.value.code == "pair"


def spoil_pairs(root, fault):
    masks = root / "masks"
    if fault == "no mask":
        (masks / "03.png").unlink()
    elif fault == "no image":
        Image.fromarray(mask_of(1)).save(masks / "77.png")
    elif fault == "other size":
        Image.fromarray(mask_of(3, (12, 15))).save(masks / "03.png")
    elif fault == "colours":
        picture(3).save(masks / "03.png")
    elif fault == "empty":
        Image.fromarray(np.full((12, 16), 255, np.uint8)).save(masks / "03.png")
    elif fault == "beyond":
        (root / "classes.txt").write_text("a\nb\n")
    elif fault == "one part":
        (root / "images").rename(root / "old")
        paired(root / "train", 2)


@pytest.mark.parametrize(
    ("fault", "says", "code"),
    [
        ("no mask", r"images/03\.png: there is no mask of this name", "pair"),
        ("no image", r"masks/77\.png: there is no image of this name", "pair"),
        ("other size", r"masks/03\.png: 12x15 pixels", "mask"),
        ("colours", r"masks/03\.png: a mask of colours", "mask"),
        ("empty", r"masks/03\.png: an empty mask", "mask"),
        ("beyond", r"masks/\d\d\.png: pixels of class 2", "mask"),
        ("one part", r"train: images and masks, but there are none in .*val", "pair"),
    ],
)
def test_what_is_wrong_with_a_pair_is_named_before_any_work(tmp_path, fault, says, code):
    spoil_pairs(paired(tmp_path), fault)
    with pytest.raises(InputError, match=says) as caught:
        open_data(str(tmp_path))
    assert caught.value.code == code
    assert caught.value.why
    assert caught.value.fix


def test_masks_in_folders_are_matched_by_their_whole_path(tmp_path):
    for number, city in enumerate(("aachen", "bern") * 3):
        name = f"{number // 2:02}.png"
        for kind in ("images", "masks"):
            (tmp_path / kind / city).mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "images" / city / name)
        Image.fromarray(mask_of(number)).save(tmp_path / "masks" / city / name)
    data = open_data(str(tmp_path), PLAIN)
    by_image = {picture(n).tobytes(): n for n in range(6)}
    loader = data.reporting()
    for row in loader.rows.tolist():
        number = by_image[loader.targets.samples(row).tobytes()]
        assert torch.equal(torch.as_tensor(loader.targets.samples.target(row)).long(),
                           expected(number))  # fmt: skip
    (tmp_path / "masks" / "bern" / "01.png").unlink()
    with pytest.raises(InputError, match=r"images/bern/01\.png: there is no mask"):
        open_data(str(tmp_path))


def test_two_images_of_one_name_are_named(tmp_path):
    paired(tmp_path, 4)
    picture(9).save(tmp_path / "images" / "02.jpg")
    with pytest.raises(InputError, match=r"02\.png: has the name of 02\.jpg beside it") as caught:
        open_data(str(tmp_path))
    assert caught.value.code == "pair"


def coco(root, form="coco", **changes):
    """Two parts of four images; image n has n % 3 boxes, of categories 7 and 9."""
    for part in ("train", "val"):
        folder = root / part if form == "roboflow" else root / f"{part}2017"
        folder.mkdir(parents=True)
        images, boxes = [], []
        for number in range(4):
            picture(number, (40, 50)).save(folder / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg"})
            for box in range(number % 3):
                bbox = [2 + 10 * box, 3, 12.5, 20]
                boxes.append({"id": len(boxes), "image_id": number, "category_id": 9 - 2 * box,
                              "bbox": bbox})  # fmt: skip
        content = {"images": images, "annotations": boxes,
                "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}]}  # fmt: skip
        if part == "val":
            for key, value in changes.items():
                content["annotations"][1][key] = value
        path = folder / "_annotations.coco.json"
        if form == "coco":
            path = root / "annotations" / f"instances_{part}2017.json"
            path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("form", ["coco", "roboflow"])
def test_boxes_of_coco_become_corners_and_scale_with_their_image(tmp_path, form):
    settings = DataSettings(input=(3, 80, 50), augment="none", workers=0, validation=0)
    data = open_data(str(coco(tmp_path, form)), settings)
    assert isinstance(data.task, Detection)
    assert data.info.classes == ("background", "cat", "dog")
    assert "2 images have no box" not in data.info.notes
    images, targets = next(iter(data.reporting()))
    assert isinstance(images, list)
    assert images[2].shape == (3, 80, 50)
    assert 0 <= float(images[2].min()) <= float(images[2].max()) <= 1
    assert targets[2]["labels"].tolist() == [2, 1]
    assert targets[2]["boxes"].tolist() == [[2, 6, 14.5, 46], [12, 6, 24.5, 46]]
    assert targets[0]["boxes"].shape == (0, 4)
    assert data.info.notes == ("4 images have no box: nothing is to be found in them",)
    assert next(iter(open_data(str(tmp_path)).training(2)))[0][0].shape == (3, 40, 50)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bbox": [40, 3, 20, 20]}, r"annotation 1 of 2\.jpg is outside of its image"),
        ({"bbox": [4, 3, 0, 20]}, r"annotation 1 of 2\.jpg is empty"),
        ({"bbox": []}, r"annotation 1 of 2\.jpg is empty"),
        ({"bbox": [4, 3, "a", 20]}, r"annotations\[1\]\.bbox\[2\]: expected float, got str"),
        ({"image_id": 99}, "annotation 1 is of no image"),
        ({"category_id": 8}, "annotation 1 is of no category"),
    ],
)
def test_what_is_wrong_with_an_annotation_is_named_before_any_work(tmp_path, changes, says):
    coco(tmp_path, **changes)
    with pytest.raises(InputError, match=says) as caught:
        open_data(str(tmp_path))
    assert "instances_val2017.json" in caught.value.what
    assert caught.value.code == "annotation"


def test_an_image_of_an_annotation_that_is_missing_or_elsewhere_is_named(tmp_path):
    coco(tmp_path)
    (tmp_path / "val2017" / "3.jpg").unlink()
    with pytest.raises(InputError, match=r"image 3\.jpg is missing") as caught:
        open_data(str(tmp_path))
    assert caught.value.code == "pair"
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("3.jpg", "../../secret.jpg"))
    with pytest.raises(InputError, match="leads out of the folder"):
        open_data(str(tmp_path))


def test_two_images_of_one_id_are_named_and_boxes_around_crowds_are_no_examples(tmp_path):
    coco(tmp_path, iscrowd=1)
    data = open_data(str(tmp_path), DataSettings(augment="none", workers=0))
    counts = [len(own["boxes"]) for _, targets in data.reporting() for own in targets]
    assert counts == [0, 1, 1, 0]  # the second box of image 2 is one of a crowd
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][3]["id"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"image 3\.jpg has the id 1 of 1\.jpg") as caught:
        open_data(str(tmp_path))
    assert caught.value.code == "annotation"


@pytest.mark.parametrize("task", ["segmentation", "detection", "regression", "multi_label"])
def test_images_with_classes_are_refused_for_tasks_with_other_targets(tmp_path, task):
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            picture(1).save(tmp_path / part / name / "1.png")
            picture(2).save(tmp_path / part / name / "2.png")
    for source in (str(tmp_path), "digits"):
        with pytest.raises(InputError, match="holds targets for classification, not for") as caught:
            open_data(source, DataSettings(task=task))
        assert caught.value.fix == "--task classification, or give other data"
    for fitting in ("classification", "embedding"):
        assert open_data(str(tmp_path), DataSettings(task=fitting)).info.task == fitting


def table(root, lines, *, images=6):
    (root / "images").mkdir(parents=True, exist_ok=True)
    for number in range(images):
        picture(number).save(root / "images" / f"{number}.png")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def test_columns_of_labels_and_of_numbers_become_targets(tmp_path):
    rows = [f"{n}.png,{n % 2},{int(n > 2)},{'val' if n > 3 else 'train'}" for n in range(6)]
    table(tmp_path / "a", ["file,hat,coat,split", *rows])
    settings = DataSettings(augment="none", workers=0, validation=0)
    data = open_data(str(tmp_path / "a"), settings)
    assert isinstance(data.task, MultiLabel)
    assert data.info.classes == ("hat", "coat")
    assert next(iter(data.reporting()))[1].tolist() == [[0, 1], [1, 1]]
    assert next(iter(data.calibration()))[1].shape == (4, 2)
    table(tmp_path / "b", ["file,age", *(f"{n}.png,{n}.5" for n in range(6))])
    aged = open_data(str(tmp_path / "b"), settings)
    assert isinstance(aged.task, Regression)
    ages = [y for loader in (aged.reporting(), aged.calibration()) for _, y in loader]
    assert sorted(torch.cat(ages).flatten().tolist()) == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    as_numbers = open_data(str(tmp_path / "a"), DataSettings(task="regression", workers=0))
    assert isinstance(as_numbers.task, Regression)


@pytest.mark.parametrize(
    ("lines", "says", "code"),
    [
        (["file,a,b", "0.png,1,"], r"labels\.csv, line 2: b is empty", "annotation"),
        (["file,a,b", "0.png,1,0", "1.png,x,0"], "line 3: a is 'x'", "annotation"),
        (["file,a", "0.png,nan"], "line 2: a is 'nan'", "annotation"),
        (["file,a", "0.png,1,2"], "line 2: 3 cells", "annotation"),
        (["file,a", "9.png,1"], r"line 2: image 9\.png is missing", "pair"),
        (["file,a", "../0.png,1"], r"line 2: image '\.\./0\.png'", "annotation"),
        (["file,a"], "no rows below a line of column names", "annotation"),
    ],
)
def test_what_is_wrong_with_a_table_is_named_with_its_line(tmp_path, lines, says, code):
    with pytest.raises(InputError, match=says) as caught:
        open_data(str(table(tmp_path, lines)))
    assert caught.value.code == code


def test_a_folder_of_another_task_is_refused_with_its_own(tmp_path):
    with pytest.raises(InputError, match="holds targets for segmentation, not for det") as caught:
        open_data(str(paired(tmp_path)), DataSettings(task="detection"))
    assert (caught.value.code, caught.value.fix.split(",")[0]) == ("task", "--task segmentation")
    with pytest.raises(InputError, match="shapes have no targets for regression"):
        open_data("shapes", DataSettings(task="regression"))


@pytest.mark.parametrize("augment", [Augment(flip=True, pad=5), Augment(resized_crop=True)])
def test_a_mask_and_boxes_follow_their_image(augment):
    """Every pixel of the image holds its class, and a box is where its pixels are."""
    values = np.zeros((32, 32), np.int64)
    values[6:18, 4:20] = 7
    image = torch.from_numpy(values.astype(np.uint8))[None].repeat(3, 1, 1)
    box = np.array([[4, 6, 20, 18]], np.float32)
    change = transform(augment, (32, 32))
    for seed in range(8):
        torch.manual_seed(seed)
        mask = wrapped(values, (32, 32))
        seen, moved = change(seprune_image(image), mask)
        inside = moved != 255
        if augment.resized_crop:  # the image is blended, the mask is not
            assert float((seen[0].round() == moved).float().mean()) > 0.8
        else:
            assert torch.equal(seen[0][inside].long(), moved.as_subclass(torch.Tensor)[inside])
        torch.manual_seed(seed)
        target = wrapped({"boxes": box, "labels": np.array([1])}, (32, 32))
        seen, target = change(seprune_image(image), target)
        rows, columns = np.nonzero(np.asarray(seen[0]) >= 4)
        found = target["boxes"].as_subclass(torch.Tensor)[0]
        wanted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.allclose(found.numpy(), wanted, atol=1.5)


def seprune_image(pixels):
    from torchvision import tv_tensors

    return tv_tensors.Image(pixels)


def test_drawn_shapes_are_the_same_for_everybody_and_fit_their_targets():
    masks, boxes = Drawn("segmentation", 1, 12), Drawn("detection", 1, 12)
    kinds = set()
    for row in range(12):
        assert np.array_equal(np.asarray(masks(row)), np.asarray(boxes(row)))
        mask, target = masks.target(row), boxes.target(row)
        assert np.array_equal(np.asarray(masks(row)), np.asarray(Drawn("segmentation", 1, 12)(row)))
        for (left, top, right, bottom), label in zip(
            target["boxes"].astype(int), target["labels"], strict=True
        ):
            assert (mask[top:bottom, left:right] == label).sum() >= 40
            kinds.add(SHAPES[label - 1])
        assert set(np.unique(mask)) - {0} == set(target["labels"].tolist())
    assert kinds == set(SHAPES)
    data = open_data("shapes", DataSettings(task="segmentation", workers=0))
    assert data.info.classes == ("background", *SHAPES)
    assert (data.info.training, data.info.validation, data.info.reporting) == (1080, 120, 300)
    assert data.info.fingerprint != open_data("shapes").info.fingerprint


def test_the_loader_of_a_folder_says_its_task(tmp_path):
    data = open_data(str(paired(tmp_path)), PLAIN)
    net = torch.nn.Conv2d(3, 3, 1)
    score = seprune.evaluate(net, data.reporting(), device="cpu")
    assert (score.task, score.metric, score.count) == ("segmentation", "miou", 2)
    whole = [data.training(4, seed=1) for _ in range(2)]
    for (a, x), (b, y) in zip(*whole, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    parts = [list(data.calibration(6).on(torch.device("cpu"), rank, 2)) for rank in range(2)]
    assert [len(y) for part in parts for _, y in part] == [3, 3]


@pytest.mark.parametrize("form", ["masks", "boxes", "table"])
def test_deep_images_of_all_tasks_are_on_the_scale_of_their_data_set(tmp_path, form):
    """On a scale of its own a dark image would be as bright as the others."""
    if form == "masks":
        paired(tmp_path / "train", 4)
        paired(tmp_path / "val", 4)
    elif form == "boxes":
        coco(tmp_path)
    else:
        table(
            tmp_path,
            ["file,age,split", *(f"{n}.png,{n},{'val' if n > 3 else 'train'}" for n in range(6))],
        )
    found = [
        p for p in tmp_path.rglob("*") if p.suffix in (".png", ".jpg") and "masks" not in p.parts
    ]
    for path in found:
        top = 900 if path.stem.endswith("1") else 4000
        size = Image.open(path).size[::-1]
        Image.fromarray(np.full(size, top, np.uint16)).save(path, "PNG")
    source = open_source(str(tmp_path))
    assert sum("scaled from 0 (black) to 4095 (white)" in note for note in source.notes) == 1
    for part in (source.train, source.val):
        levels = {int(np.asarray(part(row)).max()) for row in range(len(part.labels))}
        assert levels <= {round(900 / 4095 * 255), round(4000 / 4095 * 255)}
    assert round(900 / 4095 * 255) in {int(np.asarray(source.train(row)).max()) for row in range(4)}
