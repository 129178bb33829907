"""Compares caches, finds the best for a target, and measures against other runtimes."""

from __future__ import annotations

from ..errors import MaxDiffusionError

try:
    import jinja2
    import matplotlib
    import safetensors
    import skimage
except ImportError as err:
    raise MaxDiffusionError(
        f"evaluation: {err.name} is missing; install it with: "
        'pip install "max-diffusion[evaluation]"'
    ) from err
del jinja2, matplotlib, safetensors, skimage

from .compare import Comparison, Row, Score, compare  # noqa: E402
from .comparison_report import save_comparison  # noqa: E402
from .drawing import Setting  # noqa: E402
from .metrics import Lpips, psnr, ssim  # noqa: E402
from .target import Target  # noqa: E402
from .tune import TuningResult, tune  # noqa: E402
from .tuning_report import save_tuning  # noqa: E402

__all__ = [
    "Comparison",
    "Lpips",
    "Row",
    "Score",
    "Setting",
    "Target",
    "TuningResult",
    "compare",
    "psnr",
    "save_comparison",
    "save_tuning",
    "ssim",
    "tune",
]
