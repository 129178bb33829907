"""Captioned clips of moving shapes: what a video demo model learns and is judged on.

A clip is one or two coloured shapes on a plain background, each with one motion. The
same description yields the caption, the frames and the expectation that
:func:`~max_diffusion.demo.check_clip` compares videos with. Combinations for which
:func:`is_held_out_clip` is true are never drawn for training.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from .scenes import BACKGROUNDS, COLOURS, SceneObject, outline

CLIP_SIZE_PX: Final = 64
CLIP_FRAMES: Final = 17
# Of the points of a star little is left after an autoencoder, at this size.
CLIP_SHAPES: Final = ("circle", "square", "triangle")
# Black is too near to the navy ground, and white to the cream one, to tell apart.
CLIP_COLOURS: Final = tuple(c for c in COLOURS if c not in ("black", "white"))
CLIP_BACKGROUNDS: Final = ("gray", "cream", "navy")

MOTION_PHRASES: Final[dict[str, tuple[str, ...]]] = {
    "right": ("moving right", "moving to the right", "going right"),
    "left": ("moving left", "moving to the left", "going left"),
    "up": ("moving up", "rising", "going up"),
    "down": ("moving down", "falling", "going down"),
    "growing": ("growing", "getting larger"),
    "shrinking": ("shrinking", "getting smaller"),
}
MOTIONS: Final = tuple(MOTION_PHRASES)
_DIRECTIONS: Final = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
# Radius, and way from the first frame to the last, as fractions of a frame's width.
_RADIUS: Final = {1: (0.15, 0.195), 2: (0.125, 0.155)}
_WAY: Final = (0.3, 0.45)
# The smaller radius of what grows or shrinks; the larger is 1.9 to 2.2 times it.
_SMALL: Final = {1: (0.1, 0.12), 2: (0.085, 0.095)}
_SUPERSAMPLING: Final = 4
# Pairs whose contrast is too low to tell the object from the ground behind it.
_LOW_CONTRAST: Final = {("yellow", "cream")}


@dataclass(frozen=True)
class MovingObject:
    """One shape and its way; places and radii are fractions of a frame's width."""

    shape: str
    colour: str
    motion: str
    first: tuple[float, float, float]
    """Centre (x, y) and radius in the first frame."""
    last: tuple[float, float, float]
    """Centre (x, y) and radius in the last frame."""

    @property
    def phrase(self) -> str:
        """Noun phrase of the object, for example ``a red circle``."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape}"

    def at(self, frame: int) -> SceneObject:
        """Returns the object in one frame, 0 to ``CLIP_FRAMES - 1``."""
        share = frame / (CLIP_FRAMES - 1)
        x, y, radius = (
            a + share * (b - a) for a, b in zip(self.first, self.last, strict=True)
        )
        return SceneObject(self.shape, self.colour, None, x, y, radius)


@dataclass(frozen=True)
class Clip:
    """A described video of ``CLIP_FRAMES`` frames."""

    objects: tuple[MovingObject, ...]
    background: str
    caption: str


def is_held_out_clip(clip: Clip) -> bool:
    """Returns whether a clip is kept for evaluation, as one combination in ten is."""
    names = sorted(f"{o.colour} {o.shape} {o.motion}" for o in clip.objects)
    return zlib.crc32("|".join(names).encode()) % 10 == 0


def training_clip(rng: np.random.Generator) -> Clip:
    """Draws a random clip that is not held out."""
    while is_held_out_clip(clip := random_clip(rng)):
        pass
    return clip


def held_out_clip(rng: np.random.Generator) -> Clip:
    """Draws a random clip whose combination is never trained on."""
    while not is_held_out_clip(clip := random_clip(rng)):
        pass
    return clip


def random_clip(rng: np.random.Generator) -> Clip:
    """Draws a random clip, held out or not: one object in two of three, else two."""
    background = str(rng.choice(CLIP_BACKGROUNDS))
    count = 1 if rng.random() < 0.65 else 2
    usable = [c for c in CLIP_COLOURS if (c, background) not in _LOW_CONTRAST]
    colours = [str(c) for c in rng.choice(usable, size=count, replace=False)]
    while True:
        objects = tuple(_moving(rng, colour, count) for colour in colours)
        if count == 1 or _stay_apart(*objects):
            break
    clip = Clip(objects, background, "")
    return Clip(objects, background, clip_caption(rng, clip))


def clip_caption(rng: np.random.Generator, clip: Clip) -> str:
    """Words a clip; phrasings vary, the background is named in every second one."""
    phrases = []
    for item in clip.objects:
        plain, *others = MOTION_PHRASES[item.motion]
        words = plain if rng.random() < 0.5 else str(rng.choice(others))
        phrases.append(f"{item.phrase} {words}")
    text = " and ".join(phrases)
    return f"{text} on a {clip.background} background" if rng.random() < 0.5 else text


def parse_clip(text: str) -> Clip | None:
    """Returns the clip that a caption describes, its places unknown (zero), or None."""
    body, _, ground = text.lower().rstrip(".").partition(" on a ")
    background = ground.removesuffix(" background")
    if ground and background not in CLIP_BACKGROUNDS:
        return None
    motions = {words: name for name, group in MOTION_PHRASES.items() for words in group}
    pattern = re.compile(
        rf"an? ({'|'.join(CLIP_COLOURS)}) ({'|'.join(CLIP_SHAPES)}) "
        rf"({'|'.join(sorted(motions, key=len, reverse=True))})"
    )
    objects = []
    nowhere = (0.0, 0.0, 0.0)
    for part in body.split(" and "):
        match = pattern.fullmatch(part.strip())
        if match is None:
            return None
        motion = motions[match[3]]
        objects.append(MovingObject(match[2], match[1], motion, nowhere, nowhere))
    if len({item.colour for item in objects}) < len(objects) or len(objects) > 2:
        return None
    return Clip(tuple(objects), background, text)


def draw_clip(clip: Clip) -> np.ndarray:
    """Renders a clip, antialiased: uint8 ``(17, 64, 64, 3)``."""
    return np.stack([_draw_frame(clip, frame) for frame in range(CLIP_FRAMES)])


def cell_labels(clip: Clip, frame: int, cells: int) -> np.ndarray:
    """Labels what each of ``cells x cells`` parts of a frame shows.

    Returns:
        int64 ``(cells * cells,)``: index of the object that covers most of a cell, or
        -1 for background (below a fifth of the cell).
    """
    owner = np.full(cells * cells, -1)
    most = np.full(cells * cells, 0.2)
    for index, item in enumerate(clip.objects):
        mask = _mask(item.at(frame), 8 * cells).reduce(8)
        part = np.asarray(mask, np.float32).ravel() / 255
        owner[part > most] = index
        most = np.maximum(most, part)
    return owner


def _draw_frame(clip: Clip, frame: int) -> np.ndarray:
    side = CLIP_SIZE_PX * _SUPERSAMPLING
    image = Image.new("RGB", (CLIP_SIZE_PX,) * 2, BACKGROUNDS[clip.background])
    for item in clip.objects:
        mask = _mask(item.at(frame), side).reduce(_SUPERSAMPLING)
        image.paste(COLOURS[item.colour], (0, 0, *image.size), mask)
    return np.asarray(image)


def _mask(item: SceneObject, side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    points = [(x * side, y * side) for x, y in outline(item)]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask


def _moving(rng: np.random.Generator, colour: str, count: int) -> MovingObject:
    """Draws one object's shape, motion and way, inside the frame all the time."""
    shape = str(rng.choice(CLIP_SHAPES))
    motion = str(rng.choice(MOTIONS))
    if motion in _DIRECTIONS:
        first_radius = last_radius = float(rng.uniform(*_RADIUS[count]))
        way = float(rng.uniform(*_WAY))
    else:
        small = float(rng.uniform(*_SMALL[count]))
        radii = small, small * float(rng.uniform(1.9, 2.2))
        first_radius, last_radius = radii if motion == "growing" else radii[::-1]
        way = 0.0
    x, y = _DIRECTIONS.get(motion, (0, 0))
    margin = 1.25 * max(first_radius, last_radius)
    low = np.array([margin + way * max(0, -x), margin + way * max(0, -y)])
    high = np.array([1 - margin - way * max(0, x), 1 - margin - way * max(0, y)])
    start = rng.uniform(low, high)
    first = float(start[0]), float(start[1]), first_radius
    last = first[0] + way * x, first[1] + way * y, last_radius
    return MovingObject(shape, colour, motion, first, last)


def _stay_apart(one: MovingObject, other: MovingObject) -> bool:
    """Whether two objects never come nearer than a sixth of their sizes."""
    for frame in range(CLIP_FRAMES):
        a, b = one.at(frame), other.at(frame)
        distance = np.hypot(a.centre_x - b.centre_x, a.centre_y - b.centre_y)
        if distance < 1.35 * (a.radius + b.radius):
            return False
    return True
