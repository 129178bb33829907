"""Between packed latents and pictures: what decoders share, NHWC."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorType, TensorValue, ops


# Sizes come in as the shapes of int8 inputs that nobody reads: MAX takes no products of
# dimensions in a graph's signature, and a convolution between plain dimensions compiles
# in half the time of one between products of them.
def decoder_grids(num_levels: int, device: DeviceRef) -> dict[str, TensorType]:
    """Returns the types of a decoder's inputs that carry sizes.

    Tokens ``(rows, columns)``, then ``(height, width)`` of every level of the decoder,
    latents first and images last; each level is twice the one before.
    """
    shapes = {"grid": ("rows", "columns")}
    shapes |= {f"level_{i}": (f"height_{i}", f"width_{i}") for i in range(num_levels)}
    return {
        name: TensorType(DType.int8, shape, device) for name, shape in shapes.items()
    }


def unpack_latents(tokens: TensorValue, rows: Dim, columns: Dim) -> TensorValue:
    """Unpacks ``(B, rows * columns, 4 C)`` to ``(B, 2 rows, 2 columns, C)``.

    A token holds its four cells channel by channel, as diffusers packs them.
    """
    batch, _, packed = tokens.shape
    channels = int(packed) // 4
    x = ops.rebind(tokens, (batch, rows * columns, packed))
    x = ops.reshape(x, (batch, rows, columns, channels, 2, 2))
    x = ops.permute(x, [0, 1, 4, 2, 5, 3])  # B, rows, 2, columns, 2, C
    return ops.reshape(x, (batch, rows * 2, columns * 2, channels))


def pack_latents(latents: TensorValue, rows: Dim, columns: Dim) -> TensorValue:
    """Packs ``(B, 2 rows, 2 columns, C)``, as :func:`unpack_latents` unpacks them."""
    batch, channels = latents.shape[0], int(latents.shape[3])
    x = ops.rebind(latents, (batch, rows * 2, columns * 2, channels))
    x = ops.reshape(x, (batch, rows, 2, columns, 2, channels))
    x = ops.permute(x, [0, 1, 3, 5, 2, 4])  # B, rows, columns, C, 2, 2
    return ops.reshape(x, (batch, rows * columns, 4 * channels))


def to_uint8(x: TensorValue) -> TensorValue:
    """Converts images in -1..1 to uint8, rounded to nearest even as numpy does."""
    scaled = clamp(x.cast(DType.float32) * 0.5 + 0.5, 0.0, 1.0) * 255.0
    return ops.round(scaled).cast(DType.uint8)


def sized(x: TensorValue, level: TensorValue) -> TensorValue:
    """Gives ``x`` (B, h, w, C) a carrier's height and width; checked when run."""
    batch, _, _, channels = x.shape
    return ops.rebind(x, (batch, *level.shape, channels))


def clamp(x: TensorValue, low: float, high: float) -> TensorValue:
    """Bounds every element."""
    return ops.min(ops.max(x, low), high)
