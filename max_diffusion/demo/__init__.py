"""What the demo model draws: captioned scenes, and a program that judges images."""

from .checker import Verdict, check
from .judging import held_out_prompts, judge
from .scenes import Scene, held_out_scene, parse_caption

__all__ = [
    "Scene",
    "Verdict",
    "check",
    "held_out_prompts",
    "held_out_scene",
    "judge",
    "parse_caption",
]
