"""What the demo models draw: captioned scenes and clips, and programs that judge."""

from .checker import Verdict, check
from .clips import Clip, held_out_clip, parse_clip
from .judging import held_out_clip_prompts, held_out_prompts, judge
from .scenes import Scene, held_out_scene, parse_caption
from .tracking import check_clip

__all__ = [
    "Clip",
    "Scene",
    "Verdict",
    "check",
    "check_clip",
    "held_out_clip",
    "held_out_clip_prompts",
    "held_out_prompts",
    "held_out_scene",
    "judge",
    "parse_caption",
    "parse_clip",
]
