"""Several devices or machines behind one HTTP interface, by Ray Serve. Optional.

    export RAY_USAGE_STATS_ENABLED=0
    serve run max_diffusion.serving.ray_serve:app model=demo device=cpu min_replicas=2

serves on 127.0.0.1:8000 what ``max-diffusion serve`` does, from as many replicas as the
load asks for. Each is a process that owns one device, a pipeline and its engine. See
:class:`Options` for what may be set, and :func:`start` for the same from Python.

Life of a request:

1. Ray's HTTP proxy passes it to the one ``Ingress``, which runs the application that
   ``max-diffusion serve`` runs, over a ``RayBackend``.
2. Ray's router gives it to the less busy of two replicas, or keeps it in its queue
   while all have ``max_ongoing_requests``.
3. The replica's engine draws it among others, and its events come back as a stream.
4. If the replica is lost before the client was sent an image, the request goes to
   another one, once; otherwise it fails with the code ``replica_lost``.
5. A client that leaves closes the stream, which cancels the request in the engine.
"""

from __future__ import annotations

try:
    import ray.serve  # noqa: F401  # said here, before the modules that need it
except ImportError as err:
    raise ImportError(
        f"max_diffusion.serving.ray_serve: needs Ray Serve 2.60 ({err}); install it "
        'with: pip install "max-diffusion[ray]"',
        name=err.name,
    ) from err

from .application import Ingress, app, start
from .backend import RayBackend, ReplicaLostError
from .options import Options
from .replica import Replica, ReplicaState

__all__ = [
    "Ingress",
    "Options",
    "RayBackend",
    "Replica",
    "ReplicaLostError",
    "ReplicaState",
    "app",
    "start",
]
