"""A component: one model of a pipeline, its graphs and its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from max.driver import Device
from max.dtype import DType
from max.engine import Model
from max.graph import DeviceRef, Module

from graphs.weights import WeightScope

from .devices import resolve_dtype
from .graph_module import GraphBuilder
from .targets import product_dtype

if TYPE_CHECKING:
    from ..caches import DenoisingCacheConfig


# Asked for beyond four times those that the files hold, which are then told as missing.
_SPARE_WEIGHTS: Final = 1000


class ComponentModel(ABC):
    """One model of a pipeline: a text encoder, the transformer, the decoder.

    A pipeline constructs its components, compiles the modules of each
    (:meth:`graph_modules`) over one registry of weights, hands back the executable
    graphs (:meth:`bind`) and finally calls :meth:`load_model`.

    Args:
        config: The component's parsed ``config.json``.
        encoding: Compute dtype, ``float32`` or ``bfloat16``.
        devices: Devices to run on; the first one is used.
        weights: The component's weights, see ``checkpoint.ComponentWeights``.
        cache_config: The pipeline's denoising cache, for components it concerns.
    """

    is_text_encoder: ClassVar[bool] = False
    """Whether it is used before the first step only, on a request's texts."""
    name: str = ""
    """The component's, in the pipeline; the pipeline sets it before graphs are built.
    Names of its graphs and weights begin with it."""

    def __init__(
        self,
        config: Mapping[str, Any],
        encoding: str,
        devices: list[Device],
        weights: Any,
        *,
        cache_config: DenoisingCacheConfig | None = None,
    ) -> None:
        self.config = config
        self.encoding = encoding
        self.devices = devices
        self.weights = weights
        self.cache_config = cache_config
        self.models: Mapping[str, Model] = {}

    @property
    def device(self) -> Device:
        """The device this component runs on."""
        return self.devices[0]

    @property
    def device_ref(self) -> DeviceRef:
        """The same device, as graphs name it."""
        return DeviceRef.from_device(self.devices[0])

    @property
    def dtype(self) -> DType:
        """Compute dtype."""
        return resolve_dtype(self.encoding, self.devices[0])

    def weight_scope(self, *, is_plain: bool = False) -> WeightScope:
        """Where this component's graphs draw their weights from.

        Args:
            is_plain: For graphs of MAX's own operations only, which are built quicker:
                of those that are only looked at.
        """
        held = len(getattr(self.weights, "tensors", ()))
        limit = _SPARE_WEIGHTS + 4 * held
        products = None
        if self.device.is_host and not is_plain:
            products = product_dtype(self.dtype)
        return WeightScope(
            self.name, self.dtype, self.device_ref, limit, products=products
        )

    def build_graphs(self, module: Module) -> WeightScope | None:
        """Adds this component's graphs to ``module``; none by default.

        Not called where compiled graphs of the same are found: what the component
        needs to run them is made elsewhere.

        Returns:
            The scope the graphs drew their weights from. The pipeline checks the
            component's weights against it, strictly both ways, before it compiles.
        """
        return None

    def graph_modules(self) -> Mapping[str, GraphBuilder]:
        """Returns what builds this component's graphs, by the module they are in.

        Modules compile one by one, and one that did not change is found compiled,
        whatever else a pipeline has.
        """
        return {self.name: self.build_graphs}

    def bind(self, models: Mapping[str, Model]) -> None:
        """Receives the pipeline's executable graphs by name, in ``self.models``."""
        self.models = models

    @abstractmethod
    def load_model(self) -> Callable[..., Any] | None:
        """Makes the component ready; called once, after :meth:`bind`.

        Returns:
            What runs the model, or ``None`` if the component's methods do.
        """
