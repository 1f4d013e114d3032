"""Exact detector for images of the shapes world: every cell is compared with every object that could lie there."""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

from umm_zoo.batch import Images, by_size
from umm_zoo.errors import Share, UserError, Weight
from umm_zoo.shapes.rendering import cell_boxes, coverage, ink
from umm_zoo.shapes.scenes import BACKGROUNDS, COLOURS, DETAILS, MAX_JITTER, PLACES, SHAPES, SIZES, Object, Scene


class ShapesDetector:
    """Detector of background and objects, which compares every cell with its template of every object, and with none.

    Analysis by synthesis: the template of least squared error wins, over all objects of a cell and over the four backgrounds of the
    whole image. A cell counts as filled where an object leaves at most ``max_share`` of the error that the empty cell leaves,
    and at most ``max_error`` in itself; noise therefore shows nothing. Templates take part unshifted and at the ends of the world's
    jitter.

    Args:
        cells: per side.
        num_colours: the first of the world's colours.
        num_shapes: the first of the world's shapes.
        detail, max_jitter: those of the world.
        max_error: root mean square over the pixels of a cell, of values in [-1, 1].
        max_share: of the squared error.

    Raises:
        ValueError: the world has no such board, no so many colours or shapes, or no such detail.
    """

    def __init__(
        self,
        cells: int = 2,
        num_colours: int = 4,
        num_shapes: int = 2,
        detail: str = "mark",
        max_jitter: int = MAX_JITTER,
        max_error: Weight = 0.3,
        max_share: Share = 0.5,
    ) -> None:
        if cells not in PLACES or not 1 <= num_colours <= len(COLOURS) or not 1 <= num_shapes <= len(SHAPES):
            raise ValueError(
                f"ShapesDetector: found {cells} cells, {num_colours} colours and {num_shapes} shapes, expected "
                f"{' or '.join(map(str, PLACES))} cells, 1 to {len(COLOURS)} colours and 1 to {len(SHAPES)} shapes"
            )
        if detail not in DETAILS:
            raise ValueError(f"ShapesDetector.detail: found '{detail}', expected {', '.join(DETAILS)}")
        self.cells, self.num_colours = cells, num_colours
        shifts = sorted({-max_jitter, 0, max_jitter})  # a mark's contrast is such that 1/4 px outweighs the shape around it
        self._detail = detail
        self._forms = tuple(itertools.product(SHAPES[:num_shapes], SIZES, DETAILS[detail], itertools.product(shifts, shifts)))
        self.max_error, self.max_share = max_error, max_share

    @torch.no_grad()
    def __call__(self, images: Images) -> list[Scene]:
        """The scene that each of B images ``[3, H, W]`` in [-1, 1] shows; square, of any sizes.

        ``background`` is empty where it is none of the world's; ``stripes`` are not looked for, nor is the jitter of objects.

        Raises:
            UserError: an image is no square.
        """
        found = dict[int, Scene]()
        for places, stack in by_size(images):
            if places:  # no stand-in
                found.update(zip(places, self._detect(stack.detach().float().clamp(-1, 1)), strict=True))
        return [found[place] for place in range(len(images))]

    def _detect(self, images: Tensor) -> list[Scene]:
        """The scenes of images of one size."""
        if images.shape[-2] != images.shape[-1]:
            found = f"an image of {images.shape[-2]} x {images.shape[-1]} px"
            raise UserError("ShapesDetector", found, "squares, which the scenes of the shapes world are")
        boxes = cell_boxes(self.cells, images.shape[-1])
        errors = []
        for box in boxes.values():
            patch = images[:, :, *box]
            board = tuple(patch.shape[2:]), self.cells, images.shape[-1]
            templates = _templates(*board, self.num_colours, self._detail, self._forms)
            empty, filled = _errors(patch, *(part.to(patch.device) for part in templates))
            errors.append((empty, *filled.flatten(2).min(dim=2)))
        return self._scenes(list(boxes), *(torch.stack(parts, 1).cpu() for parts in zip(*errors, strict=True)))

    def _scenes(self, places: list[str], empty: Tensor, best: Tensor, which: Tensor) -> list[Scene]:
        """``[B, cells, backgrounds]`` mean squared errors without and with the best object, and which that is."""
        background = torch.minimum(empty, best).sum(dim=1).argmin(dim=1)  # [B]
        pick = background[:, None, None].expand(-1, len(places), 1)
        empty, best, which = (values.gather(2, pick)[..., 0] for values in (empty, best, which))  # [B, cells]
        filled = (best <= self.max_share * empty) & (best <= self.max_error**2)
        clear = ((torch.where(filled, best, empty) <= self.max_error**2).float().mean(dim=1) > 0.5).tolist()
        colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
        found = []
        for row in range(len(empty)):
            objects = []
            for i in filled[row].nonzero().flatten().tolist():
                colour, form = divmod(int(which[row, i]), len(self._forms))
                shape, size, mark, _ = self._forms[form]
                objects.append(Object(shape, colours[colour], size, places[i], mark))
            found.append(Scene(backgrounds[int(background[row])] if clear[row] else "", "", tuple(objects)))
        return found


def _errors(patch: Tensor, masks: Tensor, paints: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors of `_templates`: of empty cells ``[B, backgrounds]`` and of filled ones ``[B, backgrounds, colours, K]``.

    Background, body and mark add up to one in every pixel, so errors need inner products with their masks only.
    """
    pixels = patch.flatten(2)  # [B, 3, P]
    energy = pixels.square().sum(dim=(1, 2))  # [B]
    overlaps = torch.einsum("bcp,kmp->bkmc", pixels, masks)
    gram = torch.einsum("kmp,knp->kmn", masks, masks)
    cross = torch.einsum("bkmc,gomc->bgok", overlaps, paints)
    square = torch.einsum("kmn,gomc,gonc->gok", gram, paints, paints)
    filled = energy[:, None, None, None] - 2 * cross + square
    ground = paints[:, 0, 0]  # [backgrounds, 3]
    empty = (pixels[:, None] - ground[None, :, :, None]).square().sum(dim=(2, 3))
    count = pixels.shape[1] * pixels.shape[2]
    return empty / count, filled.clamp(min=0) / count


#: Shape, size, mark and jitter of an object.
_Form = tuple[str, str, str, tuple[int, int]]


@cache
def _templates(
    box: tuple[int, ...], cells: int, image_size: int, num_colours: int, detail: str, forms: tuple[_Form, ...]
) -> tuple[Tensor, Tensor]:
    """Shares of background, body and mark of K objects in any colour ``[K, 3, P]``; paints ``[backgrounds, colours, 3, RGB]``."""
    shares = []
    for form in forms:
        body, mark = (torch.from_numpy(share).flatten() for share in coverage(box, cells, image_size, detail, *form))
        shares.append(torch.stack([(1 - body) * (1 - mark), body * (1 - mark), mark]))
    colours = list(COLOURS)[:num_colours]
    paints = [[[ground, COLOURS[colour], ink(colour)] for colour in colours] for ground in BACKGROUNDS.values()]
    return torch.stack(shares), torch.tensor(paints, dtype=torch.float32) / 127.5 - 1
