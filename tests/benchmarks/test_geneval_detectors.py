"""Detectors of GenEval: resizing as OpenCV does it, Mask2Former's reading against loops, files in ONNX."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.benchmarks.geneval import mask2former
from umm_zoo.benchmarks.geneval.detector import COCO, Detector, assert_coco_order, coco_name, eight_bits
from umm_zoo.benchmarks.geneval.mask2former import Mask2Former, normalised, resized_to
from umm_zoo.benchmarks.geneval.onnx_detector import ONNXDetector, _distinct
from umm_zoo.benchmarks.geneval.opencv import resize
from umm_zoo.errors import UserError
from umm_zoo.metrics.geneval_rule import Detections

SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
TINY = {
    "backbone_config": {**SWIN, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 24, "dim_feedforward": 24,
    "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 7,
}  # fmt: skip
#: An image and what OpenCV 4.7 makes of it.
PIXELS = [[248, 194, 190, 207, 147], [26, 237, 21, 245, 211], [239, 45, 5, 157, 159], [60, 54, 236, 109, 46]]
RESIZED = [
    [[248, 207, 192, 197, 192, 147], [169, 199, 163, 167, 208, 170], [42, 186, 117, 120, 233, 206], [133, 139, 66, 91, 197, 185],
     [226, 91, 31, 76, 153, 151], [124, 69, 111, 142, 116, 86], [60, 55, 160, 183, 93, 46]],
    [[210, 186, 194, 165], [133, 93, 131, 187], [85, 107, 147, 71]],
    [[137, 163, 207, 167, 106, 172, 221, 195, 179], [150, 116, 61, 81, 121, 127, 129, 113, 103]],
]  # fmt: skip


class Told(Detector):
    """Finds what it is told, by the level of the first pixel."""

    def __init__(self, found: dict[int, Detections], batch_size: int = 2) -> None:
        super().__init__(batch_size)
        self.found, self.calls = found, []

    def detect(self, images: Tensor, least: float) -> list[Detections]:
        self.calls.append(list(images.shape))
        return [self.found[int(image[0, 0, 0])] for image in images]

    def digest(self) -> str:
        return "told"


@pytest.fixture(scope="module")
def tiny() -> Mask2Former:
    torch.manual_seed(0)
    return Mask2Former.from_config(TINY)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask2former, "SCALE", (90, 60))


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("expected", RESIZED)
def test_resizing_is_opencvs(expected: list[list[int]]) -> None:
    pixels = torch.tensor(PIXELS, dtype=torch.uint8).expand(2, 3, -1, -1)
    assert (resize(pixels, len(expected), len(expected[0])) == torch.tensor(expected)).all()


def test_half_the_size_is_a_mean_of_four() -> None:
    assert resize(torch.tensor(PIXELS, dtype=torch.uint8)[None, None, :, :4], 2, 2).tolist() == [[[[176, 166], [100, 127]]]]


def test_images_come_back_in_their_order_in_groups_of_one_size() -> None:
    detector = Told({level: Detections([f"{level}"], np.ones(1), np.zeros((1, 4))) for level in range(5)})
    sizes = [(3, 4), (5, 4), (3, 4), (3, 4), (5, 4)]
    images = [torch.full((3, *size), level / 127.5 - 1) for level, size in enumerate(sizes)]
    assert [found.names for found in detector(images)] == [["0"], ["1"], ["2"], ["3"], ["4"]]
    assert detector.calls == [[2, 3, 3, 4], [1, 3, 3, 4], [2, 3, 5, 4]] and eight_bits(torch.tensor([-2.0, 0, 2])).tolist() == [
        0,
        128,
        255,
    ]


def test_classes_in_another_order_are_refused() -> None:
    assert [coco_name(label) for label in ("Mouse", "sofa", "hair dryer", "cup", "unicorn")] == [
        "computer mouse", "couch", "hair drier", "cup", None]  # fmt: skip
    assert_coco_order("x", [f"LABEL_{i}" for i in range(80)])
    with pytest.raises(ValueError, match="x: found the class 1 'car', expected 'bicycle'"):
        assert_coco_order("x", ["person", "car", *COCO[2:]])
    with pytest.raises(ValueError, match="found 91 classes, expected COCO's 80"):
        assert_coco_order("x", [""] * 91)


@pytest.mark.parametrize(
    ("size", "resized"), [((512, 512), (800, 800)), ((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((100, 700), (190, 1333))]
)
def test_sides_after_resizing(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert resized_to(*size) == resized


def test_padding_is_grey_before_it_is_normalised() -> None:
    seen = normalised(torch.zeros(1, 3, 33, 32, dtype=torch.uint8))
    assert seen.shape == (1, 3, 64, 32)
    assert seen[0, :, 32, 0].tolist() == pytest.approx([-123.675 / 58.395, -116.28 / 57.12, -103.53 / 57.375])
    assert seen[0, :, 33, 0].tolist() == pytest.approx([4.325 / 58.395, 11.72 / 57.12, 24.47 / 57.375], abs=1e-6)


def test_reading_of_logits_object_by_object(tiny: Mask2Former, small: None) -> None:
    chance = torch.Generator().manual_seed(1)
    classes, masks = torch.randn(9, 81, generator=chance) * 3, torch.randn(9, 4, 6, generator=chance)
    resized = resized_to(20, 33)  # 55 x 90, padded to 64 x 96
    found = tiny._read(classes, masks, resized, (20, 33), 0.0)
    every = sorted(((float(p), q, c) for q, row in enumerate(classes.softmax(1)) for c, p in enumerate(row[:80])), reverse=True)[
        :100
    ]
    expected = {}
    for probability, query, label in every:
        large = F.interpolate(masks[None, query : query + 1], (64, 96), mode="bilinear")[..., :55, :90]
        logits = F.interpolate(large, (20, 33), mode="bilinear")[0, 0].numpy()
        inside = np.argwhere(logits > 0)
        quality = np.mean([1 / (1 + np.exp(-logits[y, x])) for y, x in inside])
        (top, left), (bottom, right) = inside.min(0), inside.max(0)
        expected[query, COCO[label]] = probability * quality, [left, top, right + 1, bottom + 1], len(inside)
    assert len(found.names) == len(expected) == 100
    areas = found.masks.sum(axis=(1, 2))
    for name, score, box, area in zip(found.names, found.scores, found.boxes.tolist(), areas, strict=True):
        match = [own for (_, label), own in expected.items() if label == name and own[1] == box and own[2] == area]
        assert min(abs(own[0] - score) for own in match) < 1e-6


def test_what_may_be_left_out_changes_nothing_else(tiny: Mask2Former, small: None) -> None:
    classes, masks = torch.randn(9, 81, generator=torch.Generator().manual_seed(2)) * 4, torch.randn(9, 4, 6)
    every, sure = (tiny._read(classes, masks, resized_to(20, 33), (20, 33), least) for least in (0.0, 0.3))
    assert 0 < len(sure.names) < 20
    above = every.scores > 0.3
    assert np.array_equal(every.scores[above], sure.scores[sure.scores > 0.3])
    assert np.array_equal(every.masks[above], sure.masks[sure.scores > 0.3])


def test_an_empty_mask_is_no_object(tiny: Mask2Former, small: None) -> None:
    found = tiny._read(torch.zeros(2, 81), -torch.ones(2, 4, 6), resized_to(20, 33), (20, 33), 0.0)
    assert found.scores.max() == 0 and found.boxes.max() == 0


def test_images_together_as_alone_in_any_precision(tiny: Mask2Former, small: None) -> None:
    images = [image(40, 30), image(30, 40, 1), image(40, 30, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = tiny(images)
    for one, found in zip(images, together, strict=True):
        (alone,) = tiny([one])
        assert alone.names == found.names and np.allclose(alone.scores, found.scores, atol=1e-6)
        assert found.masks.shape == (100, *one.shape[1:]) and (alone.masks != found.masks).mean() < 1e-3


def test_a_checkpoint_of_the_library_comes_back(tiny: Mask2Former, small: None, tmp_path: Path) -> None:
    tiny.model.save_pretrained(tmp_path)
    loaded = Mask2Former.from_pretrained(tmp_path)
    assert loaded.digest() == tiny.digest() and not loaded.train().model.training
    with torch.no_grad():
        loaded.model.class_predictor.bias[0] += 1
    assert loaded.digest() != tiny.digest()


def test_boxes_of_one_class_that_overlap() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [5, 0, 15, 10]], np.float32)  # overlaps .9, .9, 1 / 3
    assert _distinct(boxes, np.array([3, 3, 4, 3]), 0.45) == [0, 2, 3] and _distinct(boxes, np.array([3, 3, 4, 3]), 0.3) == [0, 2]


def onnx_file(path: Path, output: np.ndarray, side: int = 32, batch: int | str = "batch") -> Path:
    """A network that gives ``output`` times the first pixel of its input over 114, whatever it sees."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, kind = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    constants = {"output": output.astype(np.float32), "start": np.array([0, 0, 0, 0]), "end": np.array([2**31, 1, 1, 1]),
                 "shape": np.array([-1, 1, 1]), "level": np.array([114], np.float32)}  # fmt: skip
    nodes = [
        helper.make_node("Slice", ["images", "start", "end"], ["pixel"]),
        helper.make_node("Reshape", ["pixel", "shape"], ["flat"]),
        helper.make_node("Div", ["flat", "level"], ["factor"]),
        helper.make_node("Mul", ["output", "factor"], ["found"]),
    ]
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("images", kind, [batch, 3, side, side])],
        [helper.make_tensor_value_info("found", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def cells(*found: tuple[int, float, float, float, float, int, float]) -> np.ndarray:
    """``[1, 21, 85]`` of an input of 32 px: 16 cells of 8 px, 4 of 16, 1 of 32; cell, box, class and score."""
    output = np.zeros((1, 21, 85))
    for cell, x, y, w, h, label, score in found:
        output[0, cell, :5], output[0, cell, 5 + label] = (x, y, w, h, 1), score
    return output


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_yolox_is_decoded_and_put_back_into_the_image(tmp_path: Path, batch: int | str) -> None:
    # cell 6 is column 2, row 1 of the finest; cell 19 column 1, row 1 of the next; the image of 16 x 64 px is halved
    output = cells((6, 0.5, 0.25, np.log(2), 0, 16, 0.8), (19, 0.5, 0, 0, 0, 15, 0.6), (7, -0.5, 0.25, np.log(2), 0, 16, 0.7))
    detector = ONNXDetector(onnx_file(tmp_path / "x.onnx", output, batch=batch))
    blue = torch.tensor([0, 0, 114])[:, None, None] / 127.5 - 1  # the network reads the first channel
    images = [blue.expand(3, 16, 64)] * 4
    for found in copy.deepcopy(detector)(images):
        assert found.names == ["dog", "cat"] and found.scores.tolist() == pytest.approx([0.8, 0.6])
        assert np.allclose(found.boxes, [[24, 12, 56, 16], [32, 16, 64, 16]], atol=1e-4)  # cut at the lower edge
    assert detector.layout == "yolox" and detector.digest().startswith("x.onnx ")


def test_yolox_that_decodes_itself_and_yolov8_in_the_middle(tmp_path: Path) -> None:
    decoded = cells((6, 20, 10, 16, 8, 16, 0.8), (20, 30, 30, 1, 1, 0, 0.001))
    detector = ONNXDetector(onnx_file(tmp_path / "decoded.onnx", decoded))
    grey = [torch.full((3, 32, 32), 114 / 127.5 - 1)]
    assert detector.layout == "yolox, decoded" and np.allclose(detector(grey)[0].boxes, [[12, 6, 28, 14]])
    output = np.zeros((1, 84, 5))
    output[0, :4, 2], output[0, 4 + 16, 2] = (20, 18, 16, 4), 0.8
    eight = ONNXDetector(onnx_file(tmp_path / "eight.onnx", output * 255))  # the network divides by 114, its levels go up to 1
    red = torch.tensor([114, 0, 0])[:, None, None] / 127.5 - 1  # but reads the grey above the image: 8 x 32 px at row 12
    (found,) = eight([red.expand(3, 16, 64)])
    assert eight.layout == "yolov8" and found.names == ["dog"] and np.allclose(found.boxes, [[24, 8, 56, 16]], atol=0.2)


def test_yolov5_and_yolov10_are_read_as_they_are(tmp_path: Path) -> None:
    five = np.zeros((1, 63, 85))
    five[0, 7, :5], five[0, 7, 5 + 16], five[0, 8] = (20, 18, 16, 4, 0.5), 0.8, five[0, 7] * 0.9
    ten = np.zeros((1, 300, 6))
    ten[0, :3] = [[12, 16, 28, 20, 0.3, 16], [12, 16, 28, 20, 0.4, 16], [0, 0, 9, 9, 0.001, 1]]
    for name, output, scores in (("yolov5", five, [0.4]), ("yolov10", ten, [0.4, 0.3])):
        detector = ONNXDetector(onnx_file(tmp_path / f"{name}.onnx", output))
        detector._run = lambda inputs, output=output: np.repeat(output.astype(np.float32), len(inputs), axis=0)  # levels 0 to 1
        (found,) = detector([torch.zeros(3, 16, 64)])
        assert detector.layout == name and found.names == ["dog"] * len(scores)
        assert np.allclose(found.scores, scores) and np.allclose(found.boxes, [[24, 8, 56, 16]] * len(scores), atol=1e-4)


def test_files_that_are_no_detector_end_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found the outputs \[1, 300, 7\], expected \[B, 21, 85\] of YOLOX, or those of"):
        ONNXDetector(onnx_file(tmp_path / "other.onnx", np.zeros((1, 300, 7))))
    with pytest.raises(UserError, match=r"none\.onnx: found no file"):
        ONNXDetector(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no")
    with pytest.raises(ValueError, match="expected a detector in ONNX"):
        ONNXDetector(tmp_path / "text.onnx")


def test_without_onnxruntime_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(
        UserError, match=r"ONNXDetector: found no onnxruntime, expected it installed; pip install 'umm_zoo\[onnx\]'"
    ):
        ONNXDetector("x.onnx")
