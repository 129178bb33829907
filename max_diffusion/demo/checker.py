"""Judges an image against its scene: which coloured shapes are there, and where.

Knows nothing of the model: it segments by colour, names each blob by comparing its
outline with the drawn shapes, and compares objects and relation with the scene. Sizes
(``small``, ``large``) are not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE_PX, Scene, SceneObject, outline

# A blob of 30 px keeps 8 or more under the 3x3 erosion, a speck below 12 px at most 2.
_MIN_CORE_PX = 5
_MIN_AREA_PX = 22
# A point of a star is narrower than 3 px, and so outside its core, for 4 px.
_CORE_REACH_PX = 5
# Colour distances (Euclidean, levels). The closest ground and colour are 69 apart, the
# closest two colours 79; 25 levels in each channel are 43.
_MIN_FROM_GROUND = 20.0
_MAX_COLOUR_ERROR = 60.0
# What a drawn shape loses to pixels stays above, what only resembles it below.
_MIN_SIMILARITY = 0.83
_GRID = 48
_GRID_ROOT_AREA = 20.0
_SQUARE = np.ones((3, 3), bool)


@dataclass(frozen=True)
class FoundObject:
    """A coloured blob in an image: its shape, colour, and place in pixels."""

    shape: str
    """Shape of the blob: one of ``SHAPES``, or ``unclear``."""
    colour: str
    """Colour of the blob: a key of ``COLOURS``, or ``other``."""
    centre_x: float
    centre_y: float
    area: int
    mask: np.ndarray
    """Pixels of the blob, bool ``(128, 128)``; holes are filled unless the background
    shows in them."""


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows its scene, and if not, why."""

    is_right: bool
    """Whether objects and relation are right; the background does not count."""
    objects_right: bool
    """Whether exactly the scene's colours and shapes are there, none missing, none too
    many."""
    relation_right: bool
    """Whether the relation is right; ``False`` unless the objects are right."""
    background_right: bool
    """Whether the background is right; ``True`` if the caption names none."""
    found: tuple[FoundObject, ...]
    reason: str
    """Why the image is not right; empty if it is."""


def check(picture: np.ndarray, scene: Scene) -> Verdict:
    """Compares an image with its scene.

    Args:
        picture: The image, uint8 ``(128, 128, 3)``.
        scene: The scene that it should show.

    Raises:
        ValueError: The image has another shape or dtype.
    """
    if picture.shape != (SIZE_PX, SIZE_PX, 3) or picture.dtype != np.uint8:
        raise ValueError(
            f"check: expected uint8 {(SIZE_PX, SIZE_PX, 3)}, "
            f"got {picture.dtype} {picture.shape}"
        )
    pixels = picture.astype(np.float32)
    ground = _background(pixels)
    found = _found(pixels, ground)
    wanted = sorted(f"{o.colour} {o.shape}" for o in scene.objects)
    seen = sorted(f"{o.colour} {o.shape}" for o in found)
    objects_right = wanted == seen
    relation_right = objects_right and any(
        _relation_holds(scene.relation, order) for order in _assignments(scene, found)
    )
    reason = ""
    if not objects_right:
        reason = f"expected {', '.join(wanted)}; found {', '.join(seen) or 'nothing'}"
    elif not relation_right:
        reason = f"objects are right, but not {scene.relation}"
    return Verdict(
        is_right=relation_right,
        objects_right=objects_right,
        relation_right=relation_right,
        background_right=_background_holds(scene, ground),
        found=found,
        reason=reason,
    )


def _background(pixels: np.ndarray) -> np.ndarray:
    """Returns each row's colour, ``(128, 3)``: a line through the side borders.

    Backgrounds are plain or graded from top to bottom, so a robust line fits all rows.
    """
    border = np.concatenate([pixels[:, :3], pixels[:, -3:]], axis=1)
    rows = np.median(border, axis=1)  # 128, 3
    position = np.linspace(0, 1, len(rows))
    design = np.stack([1 - position, position], axis=1)
    weights = np.ones((len(rows), 1))
    for _ in range(4):
        ends, *_ = np.linalg.lstsq(design * weights, rows * weights, rcond=None)
        line = design @ ends
        # Rows where an object touches the border must not bend the line.
        away = np.linalg.norm(rows - line, axis=1, keepdims=True)
        weights = 1 / (1 + (away / 8) ** 2)
    return line.astype(np.float32)


def _background_holds(scene: Scene, ground: np.ndarray) -> bool:
    if not scene.caption.endswith((" background", " gradient")):
        return True
    names = list(BACKGROUNDS)
    palette = np.array([BACKGROUNDS[name] for name in names], np.float32)
    distances = np.linalg.norm(ground[[0, -1], None] - palette, axis=2)  # 2, names
    nearest = tuple(names[i] for i in distances.argmin(axis=1))
    return nearest == scene.background and bool(distances.min(1).max() < 60)


def find_objects(picture: np.ndarray) -> tuple[FoundObject, ...]:
    """Finds the blobs of an image, uint8 ``(128, 128, 3)``, in no order."""
    pixels = picture.astype(np.float32)
    return _found(pixels, _background(pixels))


def _found(pixels: np.ndarray, ground: np.ndarray) -> tuple[FoundObject, ...]:
    """Finds all blobs, in no order: cores first, then every pixel to a core.

    Between two colours antialiasing and blur make 1-2 px of what looks like a third;
    such a band has no core, so in the second step its pixels go to its neighbours.
    """
    cores = _cores(pixels, ground)
    colours = [pixels[core].mean(axis=0) for core in cores]
    cost = np.linalg.norm(pixels - ground[:, None, :], axis=2)
    owner = np.full(cost.shape, -1)
    gap = np.zeros(cost.shape, np.float32)
    for index, (core, colour) in enumerate(zip(cores, colours, strict=True)):
        away = ndimage.distance_transform_edt(~core).astype(np.float32)
        # Among blobs of one colour the nearest core wins.
        mine = np.linalg.norm(pixels - colour, axis=2)
        is_close = away <= _CORE_REACH_PX
        is_same = (np.abs(mine - cost) < 12) & (owner >= 0)
        better = is_close & np.where(is_same, away < gap, mine < cost)
        cost[better], owner[better], gap[better] = mine[better], index, away[better]
    found = []
    for index, (core, colour) in enumerate(zip(cores, colours, strict=True)):
        parts, _ = ndimage.label(owner == index, _SQUARE)
        blob = np.isin(parts, np.unique(parts[core & (owner == index)]))
        blob &= parts > 0
        if blob.sum() >= _MIN_AREA_PX:
            found.append(_describe(_fill(blob, owner), colour))
    return tuple(found)


def _cores(pixels: np.ndarray, ground: np.ndarray) -> list[np.ndarray]:
    """Returns the insides of all blobs, eroded, one bool mask ``(128, 128)`` each."""
    # The median keeps edges and removes single noisy pixels, each of which would
    # otherwise erode a hole of 3x3.
    smooth = ndimage.median_filter(pixels, size=(3, 3, 1))
    palette = np.array(list(COLOURS.values()), np.float32)
    to_ground = np.linalg.norm(smooth - ground[:, None, :], axis=2)
    to_colour = np.linalg.norm(smooth[:, :, None, :] - palette, axis=3)
    is_object = (to_ground > _MIN_FROM_GROUND) & (to_colour.min(axis=2) < to_ground)
    nearest = np.where(is_object, to_colour.argmin(axis=2), -1)
    cores = []
    for index in range(len(palette)):
        mask = nearest == index
        if mask.sum() < _MIN_AREA_PX // 2:
            continue
        labels, count = ndimage.label(ndimage.binary_erosion(mask, _SQUARE), _SQUARE)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        cores += [labels == i for i in np.flatnonzero(sizes >= _MIN_CORE_PX) + 1]
    return cores


def _fill(blob: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Fills a blob's holes, save those through which the background shows."""
    filled: np.ndarray = ndimage.binary_fill_holes(blob)
    hole = filled & ~blob & (owner == -1)
    return filled & ~ndimage.binary_opening(hole, _SQUARE)


def _describe(blob: np.ndarray, colour: np.ndarray) -> FoundObject:
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], np.float32)
    distances = np.linalg.norm(palette - colour, axis=1)
    is_named = distances.min() < _MAX_COLOUR_ERROR
    shape, similarity = _best_shape(blob)
    ys, xs = np.nonzero(blob)
    return FoundObject(
        shape=shape if similarity >= _MIN_SIMILARITY else "unclear",
        colour=names[int(distances.argmin())] if is_named else "other",
        centre_x=float(xs.mean()),
        centre_y=float(ys.mean()),
        area=len(xs),
        mask=blob,
    )


def _best_shape(blob: np.ndarray) -> tuple[str, float]:
    """Returns the most similar shape and its overlap with the blob, 0 to 1.

    The overlap is intersection over union.

    Both are moved to one centre of mass and scaled to one area, which unlike bounding
    boxes a single stray pixel does not disturb; proportions stay.
    """
    ys, xs = np.nonzero(blob)
    step = math.sqrt(len(xs)) / _GRID_ROOT_AREA
    corner = np.array([ys.mean(), xs.mean()]) - step * (_GRID - 1) / 2
    moved = ndimage.affine_transform(
        blob.astype(np.float32), [step, step], corner, (_GRID, _GRID), order=1
    )
    mine = moved > 0.5
    best = ("unclear", 0.0)
    for shape in SHAPES:
        # The area of a small blob is off by a few per cent, so try its neighbours.
        for scale in (0.95, 1.0, 1.05):
            other = _reference(shape, scale)
            similarity = float((mine & other).sum() / (mine | other).sum())
            if similarity > best[1]:
                best = (shape, similarity)
    return best


@cache
def _reference(shape: str, scale: float) -> np.ndarray:
    """Draws a shape around its centre of mass, with a fixed area times scale²."""
    points = np.array(outline(SceneObject(shape, "red", None, 0.0, 0.0, 1.0)))
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    area = cross.sum() / 2
    centre = ((points + following) * cross[:, None]).sum(axis=0) / (6 * area)
    factor = scale * _GRID_ROOT_AREA / math.sqrt(abs(area))
    # Polygon vertices of Pillow are pixel centres; 8 of them make a cell.
    placed = ((points - centre) * factor + _GRID / 2) * 8 - 0.5
    mask = Image.new("L", (_GRID * 8, _GRID * 8))
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in placed], fill=255)
    return np.asarray(mask.reduce(8)) > 127


def _assignments(
    scene: Scene, found: tuple[FoundObject, ...]
) -> list[list[FoundObject]]:
    """Returns every way to give each scene object a blob of its colour and shape."""
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
    if relation in ("row", "stack"):
        direction = "left of" if relation == "row" else "above"
        return all(_is_beside(a, b, direction) for a, b in pairwise(objects))
    if relation == "inside":
        return _is_inside(objects[0], objects[1])
    return _is_beside(objects[0], objects[1], relation)


def _is_inside(inner: FoundObject, outer: FoundObject) -> bool:
    """Returns whether a smaller object lies within another, but for a tenth."""
    covered = (inner.mask & outer.mask).sum() / inner.area
    return bool(inner.area < outer.area and covered > 0.9)


def _is_beside(first: FoundObject, second: FoundObject, direction: str) -> bool:
    """Returns whether the way from first to second goes mostly in ``direction``."""
    dx = second.centre_x - first.centre_x
    dy = second.centre_y - first.centre_y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[direction]
    return along > abs(across) and along > SIZE_PX * 0.05
