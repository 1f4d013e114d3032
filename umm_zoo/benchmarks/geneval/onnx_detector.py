"""Detectors of COCO's classes in ONNX files: YOLOX and its relatives."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.loading import one_line
from umm_zoo.benchmarks.geneval.detector import Detector, assert_coco_order
from umm_zoo.benchmarks.geneval.opencv import resize
from umm_zoo.errors import Count, Share, UserError
from umm_zoo.metrics.geneval_rule import Detections

_GREY, _STRIDES = 114, (8, 16, 32)
#: Boxes of an image that are compared with each other, the surest.
_MOST = 1000
#: Scores below are noise in every detector; without a limit all cells would be compared with each other.
_LEAST = 0.01


Layout = Literal["yolox", "yolox, decoded", "yolov5", "yolov8", "yolov10"]
#: Those with objectness before the classes.
_JUDGED = ("yolox", "yolox, decoded", "yolov5")


class _Input(NamedTuple):
    """What a file takes; None where any number will do."""

    name: str
    batch: int | None
    height: int
    width: int
    dtype: Any


class ONNXDetector(Detector):
    """Detector of boxes from an ONNX file with COCO's 80 classes, run by ``onnxruntime``; without masks.

    Layouts are known by the shape of what the file gives. ``[B, N, 85]`` with a cell per stride of 8, 16 and 32 is YOLOX (Ge et
    al., 2021, arXiv 2107.08430): image in the upper left corner on grey 114, blue first, levels 0 to 255; cells are decoded here
    unless the file does (tried on a grey image). ``[B, 84, N]`` is YOLOv8's: image in the middle, red first, 0 to 1; so are
    YOLOv5's ``[B, 3 N, 85]`` and YOLOv10's ``[B, 300, 6]``. Boxes of one class that overlap a surer one are left out, but for the
    last, whose boxes are final; all are cut at the edges of the image.

    Args:
        file: in ONNX.
        max_overlap: intersection over union of boxes of a class, at most (YOLOX's demonstration has .45).
        image_size: side of the input, for files that leave it open.
        batch_size: images of one size at a time, where the file takes several.

    Raises:
        UserError: ``onnxruntime`` is not installed, there is no such file, or it is a detector of another kind.
    """

    def __init__(self, file: str | Path, max_overlap: Share = 0.45, image_size: Count = 640, batch_size: Count = 16) -> None:
        super().__init__(batch_size)
        self.file, self.max_overlap, self.image_size = Path(file), max_overlap, image_size
        self._session: Any = None
        self.layout: Layout
        self.input = self._open()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the session, which cannot be copied; it is opened again."""
        return {**self.__dict__, "_session": None}

    def digest(self) -> str:
        """The file's name and a hash of its bytes."""
        return f"{self.file.name} {hashlib.sha256(self.file.read_bytes()).hexdigest()[:16]}"

    def detect(self, images: Tensor, least: float = 0.0) -> list[Detections]:
        """Boxes around what is seen."""
        original = images.shape[-2], images.shape[-1]
        inputs, factor, corner = self._inputs(images)
        rows = np.concatenate([self._run(some) for some in np.split(inputs, range(self._at_once(), len(inputs), self._at_once()))])
        return [self._read(row, factor, corner, original, max(least, _LEAST)) for row in rows]

    def _at_once(self) -> int:
        return self.input.batch or self.batch_size

    def _inputs(self, images: Tensor) -> tuple[np.ndarray, float, tuple[int, int]]:
        """Network inputs, the factor by which the images were resized, and the left upper corner where they lie."""
        height, width = images.shape[-2:]
        factor = min(self.input.height / height, self.input.width / width)
        centred = not self.layout.startswith("yolox")
        size = [max(1, round(side * factor) if centred else int(side * factor)) for side in (height, width)]
        free = self.input.height - size[0], self.input.width - size[1]
        top, left = (round(side / 2 - 0.1) for side in free) if centred else (0, 0)
        small = resize(images.cpu(), *size)
        framed = F.pad(small, (left, free[1] - left, top, free[0] - top), value=_GREY)
        values = framed.float() / 255 if centred else framed.flip(1).float()
        return values.numpy().astype(self.input.dtype), factor, (left, top)

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        """``[n, cells, 84 or 85]`` float32; of YOLOv10 ``[n, boxes, 6]``."""
        if self._session is None:
            self._open()
        missing = (self.input.batch or len(inputs)) - len(inputs)
        padded = np.concatenate([inputs, np.repeat(inputs[-1:], missing, axis=0)])
        output = np.asarray(self._session.run(None, {self.input.name: padded})[0], np.float32)[: len(inputs)]
        return output.transpose(0, 2, 1) if self.layout == "yolov8" else output

    def _read(
        self, cells: np.ndarray, factor: float, corner: tuple[int, int], original: tuple[int, int], least: float
    ) -> Detections:
        if self.layout == "yolov10":
            boxes, scores, which = cells[:, :4], cells[:, 4], cells[:, 5].astype(int)
        else:
            classes = cells[:, 5:] * cells[:, 4:5] if self.layout in _JUDGED else cells[:, 4:]
            scores, which = classes.max(axis=1), classes.argmax(axis=1)
            middles, sizes = cells[:, :2], cells[:, 2:4]
            if self.layout == "yolox":
                places, strides = _grid(self.input.height, self.input.width)
                middles, sizes = (middles + places) * strides, np.exp(sizes) * strides
            boxes = np.concatenate([middles - sizes / 2, middles + sizes / 2], axis=1)
        height, width = original
        boxes = (
            ((boxes - np.tile(np.array(corner, np.float32), 2)) / factor).clip(0, [width, height, width, height]).astype(np.float32)
        )
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > least][:_MOST]
        chosen = order if self.layout == "yolov10" else order[_distinct(boxes[order], which[order], self.max_overlap)]
        return Detections([self.names[place] for place in which[chosen]], scores[chosen], boxes[chosen])

    def _open(self) -> _Input:
        """Open the file and find out what it takes and gives."""
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("ONNXDetector", "no onnxruntime", "it installed", "pip install 'umm_zoo[onnx]'") from error
        if not self.file.is_file():
            raise UserError(self.file, "no file", "a detector in ONNX")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        gpu = {"device_id": torch.cuda.current_device()} if torch.cuda.is_available() else {}
        known = {"CUDAExecutionProvider": gpu, "CPUExecutionProvider": {}}
        providers = [(name, own) for name, own in known.items() if name in onnxruntime.get_available_providers()]
        with one_line(self.file, "a detector in ONNX"):
            self._session = onnxruntime.InferenceSession(str(self.file), options, providers=providers)
        if names := self._session.get_modelmeta().custom_metadata_map.get("names"):  # ultralytics writes a dict
            labels = ast.literal_eval(names)
            assert_coco_order(str(self.file), list(labels.values()) if isinstance(labels, dict) else list(labels))
        wanted = self._session.get_inputs()
        sides = [side if isinstance(side, int) else None for side in wanted[0].shape]
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        if len(wanted) != 1 or len(sides) != 4 or sides[1] not in (3, None) or wanted[0].type not in types:
            found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in wanted)
            raise UserError(self.file, f"the inputs {found}", "one of images [B, 3, H, W]")
        self.input = _Input(
            wanted[0].name, sides[0], sides[2] or self.image_size, sides[3] or self.image_size, types[wanted[0].type]
        )
        self.layout = self._layout()
        return self.input

    def _layout(self) -> Layout:
        """By what the file makes of a grey image."""
        grey = np.full((self.input.batch or 1, 3, self.input.height, self.input.width), _GREY, self.input.dtype)
        with one_line(self.file, "a detector in ONNX"):
            outputs = self._session.run(None, {self.input.name: grey})
        shape = np.shape(outputs[0])
        number = len(_grid(self.input.height, self.input.width)[0])
        if len(outputs) == 1 and shape[1:] == (number, 85):
            return "yolox, decoded" if outputs[0][..., :2].max() > min(self.input[2:4]) / 2 else "yolox"
        fitting: dict[Layout, bool] = {
            "yolov5": shape[1:] == (3 * number, 85),
            "yolov8": shape[1:2] == (84,),
            "yolov10": shape[2:] == (6,),
        }
        for layout, fits in fitting.items():
            if len(outputs) == 1 and len(shape) == 3 and fits:
                return layout
        found = ", ".join(str(list(np.shape(output))) for output in outputs)
        raise UserError(self.file, f"the outputs {found}", f"[B, {number}, 85] of YOLOX, or those of YOLOv5, v8 or v10")


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of each cell ``[N, 2]``, and its stride ``[N, 1]``."""
    places, strides = [], []
    for stride in _STRIDES:
        rows, columns = np.mgrid[: height // stride, : width // stride]
        places.append(np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.float32))
        strides.append(np.full((rows.size, 1), stride, np.float32))
    return np.concatenate(places), np.concatenate(strides)


def _distinct(boxes: np.ndarray, classes: np.ndarray, max_overlap: float) -> list[int]:
    """Places of boxes, the surest first, that overlap no surer one of their class by more."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    chosen: list[int] = []
    for place in range(len(boxes)):
        others = [other for other in chosen if classes[other] == classes[place]]
        corners = np.minimum(boxes[others, 2:], boxes[place, 2:]) - np.maximum(boxes[others, :2], boxes[place, :2])
        shared = corners.clip(0).prod(axis=1)
        if not (shared > max_overlap * (areas[others] + areas[place] - shared)).any():
            chosen.append(place)
    return chosen
