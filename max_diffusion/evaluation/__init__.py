"""Compares caches, and finds the best for a target."""

from __future__ import annotations

from ..errors import MaxDiffusionError

try:
    import jinja2
    import matplotlib
    import skimage
except ImportError as err:
    raise MaxDiffusionError(
        f"evaluation: {err.name} is missing; install it with: "
        'pip install "max-diffusion[evaluation]"'
    ) from err
del jinja2, matplotlib, skimage

from .compare import compare  # noqa: E402
from .comparison import Comparison, Row, Score  # noqa: E402
from .comparison_report import save_comparison  # noqa: E402
from .drawing import Setting  # noqa: E402
from .judging import Judge, Verdict  # noqa: E402
from .metrics import Lpips, flicker, psnr, ssim  # noqa: E402
from .target import Target  # noqa: E402
from .tune import tune  # noqa: E402
from .tuning_report import save_tuning  # noqa: E402
from .tuning_result import TuningResult  # noqa: E402

__all__ = [
    "Comparison",
    "Judge",
    "Lpips",
    "Row",
    "Score",
    "Setting",
    "Target",
    "TuningResult",
    "Verdict",
    "compare",
    "flicker",
    "psnr",
    "save_comparison",
    "save_tuning",
    "ssim",
    "tune",
]
