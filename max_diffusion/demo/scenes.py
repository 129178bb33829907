"""Captioned scenes of coloured shapes: what the demo model is trained and judged on.

A scene is one to three objects with a relation on a plain or graded background. The
same description yields the caption, the image and the expectation that
:func:`~max_diffusion.demo.check` compares images with. Combinations for which
:func:`is_held_out` is true are never drawn for training.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE_PX = 128
_PATCHES = 8
_SUPERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (249, 134, 22),
    "yellow": (250, 212, 28),
    "green": (34, 155, 74),
    "cyan": (20, 200, 214),
    "blue": (36, 88, 226),
    "purple": (132, 48, 190),
    "pink": (244, 112, 182),
    "white": (255, 255, 255),
    "black": (18, 18, 20),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (158, 163, 170),
    "cream": (247, 236, 208),
    "navy": (28, 38, 82),
    "mint": (190, 232, 206),
    "lavender": (212, 203, 240),
    "brown": (112, 78, 56),
}
# Pairs whose contrast is too low to tell the object from the ground behind it.
_LOW_CONTRAST = {("white", "cream"), ("black", "navy"), ("yellow", "cream")}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
# Radius as a fraction of the image's width.
SIZES = {"small": (0.085, 0.105), "large": (0.20, 0.23)}
_DEFAULT_RADIUS = (0.125, 0.165)

RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "inside": ("inside", "in", "within"),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape; centre and radius are fractions of the image's width."""

    shape: str
    colour: str
    size: str | None
    centre_x: float
    centre_y: float
    radius: float

    @property
    def phrase(self) -> str:
        """Noun phrase of the object, for example ``a small red circle``."""
        words = [word for word in (self.size, self.colour, self.shape) if word]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """A described image.

    ``relation`` is ``None`` (one object, or several in no given order), a key of
    ``RELATION_PHRASES`` (first object to second), or ``row`` or ``stack`` (all objects
    in reading order).
    """

    objects: tuple[SceneObject, ...]
    relation: str | None
    background: tuple[str, str]
    caption: str


def combination(scene: Scene) -> str:
    """Names what must not repeat in training and evaluation: objects and relation."""
    words = [f"{o.size or ''} {o.colour} {o.shape}" for o in scene.objects]
    ground = scene.background if len(scene.objects) == 1 else ()
    return "|".join([*words, scene.relation or "", *ground])


def is_held_out(scene: Scene) -> bool:
    """Returns whether a scene is kept for evaluation, as one combination in ten is."""
    return zlib.crc32(combination(scene).encode()) % 10 == 0


def random_scene(rng: np.random.Generator) -> Scene:
    """Draws a random scene, held out or not."""
    background = _random_background(rng)
    count = int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25]))
    if count == 1:
        relation = None
    elif count == 2:
        relation = str(
            rng.choice(
                ["left of", "right of", "above", "below", "inside", ""],
                p=[0.18, 0.18, 0.18, 0.18, 0.2, 0.08],
            )
        )
        relation = relation or None
    else:
        relation = str(rng.choice(["row", "stack"]))
    may_repeat = relation != "inside" and rng.random() < 0.2
    kinds = _random_kinds(rng, count, background, may_repeat)
    objects = _place(rng, kinds, relation)
    scene = Scene(objects, relation, background, "")
    return Scene(objects, relation, background, caption(rng, scene))


def training_scene(rng: np.random.Generator) -> Scene:
    """Draws a random scene that is not held out."""
    while True:
        scene = random_scene(rng)
        if not is_held_out(scene):
            return scene


def held_out_scene(rng: np.random.Generator) -> Scene:
    """Draws a random scene whose combination is never trained on."""
    while True:
        scene = random_scene(rng)
        if is_held_out(scene):
            return scene


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """Words a scene; phrasings vary, the background is named in two of three."""
    phrases = [o.phrase for o in scene.objects]
    relation = scene.relation
    if relation is None:
        text = _listing(phrases)
    elif relation == "row":
        text = f"{_listing(phrases)} in a row"
    elif relation == "stack":
        text = f"{_listing(phrases)} stacked"
    else:
        text = f"{phrases[0]} {_phrase(rng, relation)} {phrases[1]}"
    top, bottom = scene.background
    if rng.random() < 2 / 3:
        ground = f"{top} background" if top == bottom else f"{top} to {bottom} gradient"
        text += f" on a {ground}"
    return text


def parse_caption(text: str) -> Scene | None:
    """Returns the scene that a caption describes, ``None`` if it is worded otherwise.

    Reads what :func:`caption` writes. Places and radii, which no caption tells, are 0;
    a background that is not named is gray.
    """
    match = re.fullmatch(
        r"(.*?)(?: on an? (\w+)(?: background| to (\w+) gradient))?",
        text,
        re.DOTALL,
    )
    assert match
    words, top, bottom = match[1], match[2] or "gray", match[3] or match[2] or "gray"
    if not {top, bottom} <= BACKGROUNDS.keys():
        return None
    relation: str | None = None
    parts = re.split(r", | and ", words)
    for ending, name in ((" in a row", "row"), (" stacked", "stack")):
        if words.endswith(ending) and len(parts) == 3:
            relation, parts[-1] = name, parts[-1].removesuffix(ending)
    for name, phrasings in RELATION_PHRASES.items():
        # The longest first: "on the left of" holds "left of".
        for phrasing in sorted(phrasings, key=len, reverse=True):
            if relation is None and len(pair := words.split(f" {phrasing} ")) == 2:
                relation, parts = name, pair
    objects = [_parse_object(part) for part in parts]
    found = tuple(item for item in objects if item)
    wanted = {None: (1, 2), "row": (3,), "stack": (3,)}.get(relation, (2,))
    if len(found) < len(objects) or len(found) not in wanted:
        return None
    return Scene(found, relation, (top, bottom), text)


def _parse_object(text: str) -> SceneObject | None:
    sizes, colours, shapes = "|".join(SIZES), "|".join(COLOURS), "|".join(SHAPES)
    match = re.fullmatch(rf"an? (?:({sizes}) )?({colours}) ({shapes})", text)
    return SceneObject(match[3], match[2], match[1], 0.0, 0.0, 0.0) if match else None


def draw(scene: Scene) -> np.ndarray:
    """Renders a scene, antialiased: uint8, shape (128, 128, 3)."""
    side = SIZE_PX * _SUPERSAMPLING
    top, bottom = (np.array(BACKGROUNDS[name], float) for name in scene.background)
    ramp = np.linspace(0.0, 1.0, SIZE_PX)[:, None]
    column = (1 - ramp) * top + ramp * bottom
    ground = np.repeat(column[:, None, :], SIZE_PX, axis=1).round().astype(np.uint8)
    image = Image.fromarray(ground)
    for item in _painting_order(scene):
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon(
            [(x * side, y * side) for x, y in outline(item)], fill=255
        )
        colour = Image.new("RGB", image.size, COLOURS[item.colour])
        image.paste(colour, mask=mask.reduce(_SUPERSAMPLING))
    return np.asarray(image)


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels what each of the 8x8 patches of 16 px shows: shape, colour, centre.

    Returns:
        ``shape`` and ``colour``, int64 ``(64,)``: index into ``SHAPES`` and ``COLOURS``
        of the object that covers most of the patch, or their length for background
        (below a fifth of the patch); ``offset``, float32 ``(64, 2)``: from the patch's
        middle to the object's centre, x and y, in radii of the object, else zero.
    """
    shape = np.full(_PATCHES**2, len(SHAPES))
    colour = np.full(_PATCHES**2, len(COLOURS))
    offset = np.zeros((_PATCHES**2, 2), np.float32)
    covered = np.full(_PATCHES**2, 0.2)
    middle = (np.arange(_PATCHES) + 0.5) / _PATCHES
    across = np.stack(np.meshgrid(middle, middle), axis=-1).reshape(-1, 2)
    side = 4 * _PATCHES
    for item in _painting_order(scene):
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon(
            [(x * side, y * side) for x, y in outline(item)], fill=255
        )
        part = np.asarray(mask.reduce(4), np.float32).ravel() / 255
        # What is painted later hides what is below.
        is_mine = part > np.maximum(0.2, np.minimum(covered, 1 - part))
        covered = np.where(is_mine, part, covered)
        shape[is_mine] = SHAPES.index(item.shape)
        colour[is_mine] = list(COLOURS).index(item.colour)
        centre = np.array([item.centre_x, item.centre_y])
        offset[is_mine] = ((centre - across) / item.radius)[is_mine]
    return shape, colour, offset


def outline(item: SceneObject) -> list[tuple[float, float]]:
    """Returns the polygon of an object, in fractions of the image's width."""
    return [
        (item.centre_x + item.radius * x, item.centre_y + item.radius * y)
        for x, y in _UNIT_OUTLINES[item.shape]
    ]


def _ring(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


def _heart() -> list[tuple[float, float]]:
    curve = []
    for i in range(72):
        a = 2 * math.pi * i / 72
        x = 16 * math.sin(a) ** 3
        y = -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a))
        curve.append((x / 15.5, (y + math.cos(4 * a) - 2.5) / 15.5))
    return curve


_UNIT_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _ring(72, (1.0,)),
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(x * 1.15, y * 1.25 + 0.2) for x, y in _ring(3, (1.0,))],
    "star": [(x * 1.2, y * 1.2) for x, y in _ring(10, (1.0, 0.45))],
    "heart": _heart(),
    "diamond": [(0, -1.2), (0.95, 0), (0, 1.2), (-0.95, 0)],
}


def _random_background(rng: np.random.Generator) -> tuple[str, str]:
    names = list(BACKGROUNDS)
    top = str(rng.choice(names))
    if rng.random() < 0.6:
        return top, top
    return top, str(rng.choice([name for name in names if name != top]))


def _random_kinds(
    rng: np.random.Generator,
    count: int,
    background: tuple[str, str],
    may_repeat: bool,
) -> list[tuple[str, str, str | None]]:
    usable = [
        colour
        for colour in COLOURS
        if not any((colour, ground) in _LOW_CONTRAST for ground in background)
    ]
    colours = rng.choice(usable, size=count, replace=may_repeat)
    kinds: list[tuple[str, str, str | None]] = []
    for colour in colours:
        size = str(rng.choice(["small", "large"])) if rng.random() < 0.3 else None
        kinds.append((str(rng.choice(SHAPES)), str(colour), size))
    return kinds


def _place(
    rng: np.random.Generator,
    kinds: list[tuple[str, str, str | None]],
    relation: str | None,
) -> tuple[SceneObject, ...]:
    # Size words are said only where the placement can honour them.
    if len(kinds) == 3 or relation == "inside":
        kinds = [(shape, colour, None) for shape, colour, _ in kinds]
    radii = [
        float(rng.uniform(*SIZES.get(s or "", _DEFAULT_RADIUS))) for *_, s in kinds
    ]
    if relation == "inside":
        outer = float(rng.uniform(0.26, 0.33))
        radii = [outer * float(rng.uniform(0.30, 0.36)), outer]
        centre = rng.uniform(0.42, 0.58, size=2)
        centres = [_inside(kinds[1][0], centre, outer), centre]
    elif relation in ("row", "stack"):
        radii = [float(rng.uniform(0.095, 0.125)) for _ in kinds]
        along = np.array([0.19, 0.5, 0.81]) + rng.uniform(-0.02, 0.02, size=3)
        across = rng.uniform(0.4, 0.6) + rng.uniform(-0.03, 0.03, size=3)
        pairs = zip(along, across, strict=True)
        centres = [np.array(p if relation == "row" else p[::-1]) for p in pairs]
    elif len(kinds) == 2:
        direction = relation or str(rng.choice(["left of", "above"]))
        centres = list(_apart(rng, direction, *radii))
    else:
        low, high = radii[0] * 1.3, 1 - radii[0] * 1.3
        centres = [rng.uniform(max(low, 0.25), min(high, 0.75), size=2)]
    return tuple(
        SceneObject(shape, colour, size, float(c[0]), float(c[1]), radius)
        for (shape, colour, size), c, radius in zip(kinds, centres, radii, strict=True)
    )


def _inside(outer_shape: str, centre: np.ndarray, radius: float) -> np.ndarray:
    drop = {"triangle": 0.30, "heart": -0.12}.get(outer_shape, 0.0)
    return centre + np.array([0.0, drop * radius])


def _apart(
    rng: np.random.Generator, direction: str, first: float, second: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the centres of two objects side by side, apart and inside the image."""
    reach = 1.25 * (first + second)
    low, high = 1.25 * first + 0.01, 1 - 1.25 * second - 0.01
    gap = float(rng.uniform(reach, max(reach, min(reach + 0.14, high - low))))
    start = float(rng.uniform(low, max(low, high - gap)))
    widest = 1.25 * max(first, second)
    middle = float(rng.uniform(max(0.4, widest), min(0.6, 1 - widest)))
    sway = rng.uniform(-0.04, 0.04, size=2)
    along, across = (start, start + gap), (middle + sway[0], middle + sway[1])
    if direction in ("right of", "below"):
        along = (1 - along[0], 1 - along[1])
    pairs = [np.array([a, b]) for a, b in zip(along, across, strict=True)]
    if direction in ("above", "below"):
        pairs = [pair[::-1] for pair in pairs]
    return pairs[0], pairs[1]


def _painting_order(scene: Scene) -> list[SceneObject]:
    if scene.relation == "inside":
        return [scene.objects[1], scene.objects[0]]
    return list(scene.objects)


def _listing(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _phrase(rng: np.random.Generator, relation: str) -> str:
    options = RELATION_PHRASES[relation]
    # The plain word in half of the captions, the others share the rest.
    return options[0] if rng.random() < 0.5 else str(rng.choice(options[1:]))
