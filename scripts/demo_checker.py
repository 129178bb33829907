"""Judges a picture against its scene: which coloured shapes are there, and where.

Knows nothing of the model: it segments by colour, names each blob by comparing its
outline with the drawn shapes, and compares objects and relation with the scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from demo_scenes import COLOURS, SHAPES, SIZE_PX, Scene, SceneObject, outline
from PIL import Image, ImageDraw
from scipy import ndimage

# Blobs that survive this many pixels of erosion are objects; antialiased borders
# between two colours, which look like a third, do not.
_MIN_CORE_PX = 10
_MIN_AREA_PX = 40
_MASK_SIZE = 48


@dataclass(frozen=True)
class FoundObject:
    """A blob: what it is, and its centre and extent in pixels."""

    shape: str
    colour: str
    centre_x: float
    centre_y: float
    area: int
    mask: np.ndarray
    """Filled, bool ``(128, 128)``."""


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its scene, and if not, why."""

    is_right: bool
    objects_right: bool
    relation_right: bool
    found: tuple[FoundObject, ...]
    reason: str


def check(picture: np.ndarray, scene: Scene) -> Verdict:
    """Compares a picture, uint8 ``(128, 128, 3)``, with its scene."""
    found = find_objects(picture)
    wanted = [(o.colour, o.shape) for o in scene.objects]
    seen = [(o.colour, o.shape) for o in found]
    if sorted(wanted) != sorted(seen):
        return Verdict(False, False, False, found, f"expected {wanted}, found {seen}")
    for order in _assignments(scene, found):
        if _relation_holds(scene.relation, order):
            return Verdict(True, True, True, found, "")
    return Verdict(False, True, False, found, f"not {scene.relation}")


def find_objects(picture: np.ndarray) -> tuple[FoundObject, ...]:
    """All coloured shapes in a picture."""
    pixels = picture.astype(np.float64)
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], np.float64)
    ground = _background(pixels)
    to_ground = np.linalg.norm(pixels - ground[:, None, :], axis=2)
    to_colour = np.linalg.norm(pixels[:, :, None, :] - palette, axis=3)
    nearest = to_colour.argmin(axis=2)
    is_object = (to_ground > 30) & (to_colour.min(axis=2) < to_ground)
    is_object &= to_colour.min(axis=2) < 60
    found = []
    for index, name in enumerate(names):
        mask = is_object & (nearest == index)
        cores, count = ndimage.label(ndimage.binary_erosion(mask, iterations=1))
        sizes = ndimage.sum_labels(np.ones_like(cores), cores, range(1, count + 1))
        for label in np.flatnonzero(np.asarray(sizes) >= _MIN_CORE_PX) + 1:
            blob = ndimage.binary_dilation(cores == label, iterations=2) & mask
            blob = ndimage.binary_fill_holes(blob)
            if blob.sum() >= _MIN_AREA_PX:
                found.append(_describe(blob, name))
    return tuple(found)


def _background(pixels: np.ndarray) -> np.ndarray:
    """Colour of each row, ``(128, 3)``: a line through the left and right borders.

    Backgrounds are plain or graded from top to bottom, so a robust line fits all rows.
    """
    border = np.concatenate([pixels[:, :3], pixels[:, -3:]], axis=1)
    rows = np.median(border, axis=1)  # 128, 3
    position = np.linspace(0, 1, len(rows))
    weights = np.ones(len(rows))
    for _ in range(4):
        design = np.stack([1 - position, position], axis=1) * weights[:, None]
        ends, *_ = np.linalg.lstsq(design, rows * weights[:, None], rcond=None)
        line = np.stack([1 - position, position], axis=1) @ ends
        # Rows where an object touches the border must not bend the line.
        weights = 1 / (1 + (np.linalg.norm(rows - line, axis=1) / 8) ** 2)
    return line


def _describe(blob: np.ndarray, colour: str) -> FoundObject:
    ys, xs = np.nonzero(blob)
    shape = max(SHAPES, key=lambda name: _similarity(blob, name))
    return FoundObject(
        shape, colour, float(xs.mean()), float(ys.mean()), int(blob.sum()), blob
    )


def _similarity(blob: np.ndarray, shape: str) -> float:
    """Intersection over union of two masks cut to their bounding boxes."""
    ys, xs = np.nonzero(blob)
    size = max(np.ptp(ys), np.ptp(xs)) + 1
    reference = _reference(shape, (np.ptp(ys) + 1) / size, (np.ptp(xs) + 1) / size)
    cut = blob[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    image = Image.fromarray(cut.astype(np.uint8) * 255)
    resized = np.asarray(image.resize((_MASK_SIZE, _MASK_SIZE), Image.Resampling.BOX))
    mine = resized > 127
    return float((mine & reference).sum() / (mine | reference).sum())


def _reference(shape: str, height: float, width: float) -> np.ndarray:
    """A drawn shape's mask in its bounding box, all shapes stretched to a square.

    Stretching loses the aspect, so a shape whose own differs much is ruled out.
    """
    item = SceneObject(shape, "red", None, 0.5, 0.5, 0.3)
    points = np.array(outline(item))
    low, high = points.min(axis=0), points.max(axis=0)
    aspect = (high[1] - low[1]) / (high[0] - low[0])
    if abs(np.log(height / width) - np.log(aspect)) > 0.35:
        return np.zeros((_MASK_SIZE, _MASK_SIZE), bool)
    scaled = (points - low) / (high - low) * (_MASK_SIZE * 8 - 1)
    mask = Image.new("L", (_MASK_SIZE * 8, _MASK_SIZE * 8))
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in scaled], fill=255)
    return np.asarray(mask.reduce(8)) > 127


def _assignments(
    scene: Scene, found: tuple[FoundObject, ...]
) -> list[list[FoundObject]]:
    """Every way to give each object of the scene a blob of its colour and shape."""
    orders: list[list[FoundObject]] = [[]]
    for item in scene.objects:
        orders = [
            [*order, blob]
            for order in orders
            for blob in found
            if (blob.colour, blob.shape) == (item.colour, item.shape)
            and not any(blob is used for used in order)
        ]
    return orders


def _relation_holds(relation: str | None, objects: list[FoundObject]) -> bool:
    if relation is None:
        return True
    if relation == "row":
        pairs = pairwise(objects)
        return all(_is_beside(a, b, "left of") for a, b in pairs)
    if relation == "stack":
        pairs = pairwise(objects)
        return all(_is_beside(a, b, "above") for a, b in pairs)
    if relation == "inside":
        return _is_inside(objects[0], objects[1])
    if relation.startswith("inside+"):
        direction = relation.removeprefix("inside+")
        return _is_inside(objects[0], objects[1]) and _is_beside(
            objects[1], objects[2], direction
        )
    return _is_beside(objects[0], objects[1], relation)


def _is_inside(inner: FoundObject, outer: FoundObject) -> bool:
    covered = (inner.mask & outer.mask).sum() / inner.area
    return bool(inner.area < outer.area and covered > 0.9)


def _is_beside(first: FoundObject, second: FoundObject, direction: str) -> bool:
    dx = second.centre_x - first.centre_x
    dy = second.centre_y - first.centre_y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[direction]
    return along > abs(across) and along > SIZE_PX * 0.05
