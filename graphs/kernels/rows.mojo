"""Norms of rows, and rows in another dtype."""
from std.math import sqrt
from .lanes import Address, Lanes, Vector, WIDTH, in_lane, load_some, store_some, is_below

comptime NO_NORM = 0
comptime LAYER_NORM = 1
comptime RMS_NORM = 2


@fieldwise_init
struct Norm(Copyable, ImplicitlyCopyable, Movable):
    """Computes norm(x) * (offset + scale) + shift, in float32."""

    var kind: Int
    var epsilon: Float32
    var offset: Float32
    var scale: Lanes
    var has_shift: Bool
    var shift: Lanes

    @always_inline
    def moved(self, elements: Int) -> Self:
        """The same with another row's scale and shift."""
        return Norm(
            self.kind,
            self.epsilon,
            self.offset,
            self.scale.unsafe_offset(elements),
            self.has_shift,
            self.shift.unsafe_offset(elements),
        )

    def write[
        source: DType, result: DType
    ](self, size: Int, x: Address[source], y: Address[result]):
        """Norms one row."""
        var mean = Float32(0)
        if self.kind == LAYER_NORM:
            var sum = Vector(0)
            for k in range(0, size, WIDTH):
                sum += load_some(x.unsafe_offset(k), size - k)
            mean = sum.reduce_add() / Float32(size)
        var squares = Vector(0)
        for k in range(0, size, WIDTH):
            var value = load_some(x.unsafe_offset(k), size - k) - Vector(mean)
            if size - k < WIDTH:
                value = is_below(size - k).select(value, Vector(0))
            squares = value.fma(value, squares)
        var factor = Float32(1) / sqrt(
            squares.reduce_add() / Float32(size) + self.epsilon
        )
        for k in range(0, size, WIDTH):
            var rest = size - k
            var value = (load_some(x.unsafe_offset(k), rest) - Vector(mean)) * Vector(factor)
            value *= Vector(self.offset) + load_some(self.scale.unsafe_offset(k), rest)
            if self.has_shift:
                value += load_some(self.shift.unsafe_offset(k), rest)
            store_some(y.unsafe_offset(k), value, rest)


@always_inline
def copy_row[
    source: DType, result: DType
](size: Int, x: Address[source], y: Address[result]):
    """Writes one row in another dtype."""
    for k in range(0, size, WIDTH):
        store_some(y.unsafe_offset(k), load_some(x.unsafe_offset(k), size - k), size - k)
