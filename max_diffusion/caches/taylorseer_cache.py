"""TaylorSeer by itself, under its documented name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, final

from max.driver import Buffer, Device
from max.dtype import DType
from max.graph import DeviceRef

from ..core.buffers import copied
from ..errors import RequestError
from ..execution.compiler import CompiledGraphs
from ..execution.graph_call import run
from ..execution.graph_module import GraphModule
from .history import add_series_graphs
from .kinds import Run
from .series_cache import SeriesState
from .settings import DenoisingCacheConfig
from .taylorseer import TaylorSeer, TaylorSeerConfig

if TYPE_CHECKING:
    from max.engine import InferenceSession


@final
class TaylorSeerCache:
    """TaylorSeer by itself, for an executor with a denoising loop of its own.

    Compiles its forecasts as one module in the session it is given; an update only
    keeps the prediction and needs no graph, which MAX's class of this name has. The
    inside of a :class:`~max_diffusion.DiffusionPipeline` needs none of this: there the
    graphs are compiled with the rest.

    Args:
        config: Cache settings with ``taylorseer=True``; interval, warm-up and order
            may be ``None`` for 5, 9 and 1.
        dtype: Dtype of the predictions and so of the factors.
        device: Device of the predictions.
        session: Session to compile in.

    Raises:
        RequestError: ``config`` does not enable TaylorSeer, or a value is out of range.
    """

    def __init__(
        self,
        config: DenoisingCacheConfig,
        dtype: DType,
        device: Device,
        session: InferenceSession,
    ) -> None:
        if not isinstance(config, DenoisingCacheConfig):
            raise RequestError(
                "TaylorSeerCache: config must be a DenoisingCacheConfig, got "
                f"{type(config).__name__}"
            )
        settings = config.resolve()
        if not isinstance(settings, TaylorSeerConfig):
            raise RequestError(
                "TaylorSeerCache: config must have taylorseer=True; set it"
            )
        order = max(1, settings.max_order)  # order 0 needs none, but a module needs one
        device_ref = DeviceRef.from_device(device)
        build = partial(
            add_series_graphs, dtype=dtype, device=device_ref, max_order=order
        )
        graphs = CompiledGraphs(session, device)
        graphs.add([GraphModule("series", build)], dict)
        self._models = graphs.models
        self._cache = TaylorSeer(settings)

    def create_state(
        self, batch_size: int, seq_len: int, output_dim: int
    ) -> SeriesState:
        """Creates the fresh state of one request.

        Holds no zero-filled factors: zeros would be taken for data by the first
        update. The sizes are those of the predictions to come.
        """
        return self._cache.create_state(Run())

    def should_skip(self, step: int) -> bool:
        """Returns whether a 0-based step can be forecast, by the documented rule."""
        return self._cache.config.should_skip(step)

    def predict(self, state: SeriesState, step: int) -> Buffer:
        """Forecasts the prediction ``(B, S_img, C)`` of ``step``; state unchanged.

        With one computed step so far this is that step's own buffer: do not write it.

        Raises:
            CacheStateError: Nothing was computed yet.
        """
        return run(self._models, self._cache.forecast(state, step))

    def update(self, state: SeriesState, noise_pred: Buffer, step: int) -> None:
        """Takes in a computed prediction ``(B, S_img, C)`` of ``step``, in place.

        Keeps a copy: an executor may write its next output to the same buffer.

        Raises:
            CacheStateError: ``step`` is not after the last computed one.
        """
        run(self._models, self._cache.remember(state, copied(noise_pred), step))
