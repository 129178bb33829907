"""Vectors of 16 float32, and rows of 32-bit lanes.

A lane holds one float32 or a pair of bfloat16 that are neighbours along the sum of a
product. All products think in lanes, so that there is one kernel for both dtypes.
"""
from std.memory.unsafe import bitcast
from std.sys import CompilationTarget, llvm_intrinsic

comptime Vector = SIMD[DType.float32, 16]
comptime WIDTH = 16
comptime Address[dtype: DType] = Pointer[Scalar[dtype], MutUntrackedOrigin]
comptime Lanes = Address[DType.float32]


@always_inline
def multiplies_bfloat16() -> Bool:
    """Whether the processor multiplies pairs of bfloat16 and adds to float32."""
    comptime if CompilationTarget.is_x86():
        return CompilationTarget._has_feature["avx512bf16"]()
    else:
        return CompilationTarget._has_feature["bf16"]()


@always_inline
def in_lane[dtype: DType]() -> Int:
    """How many elements a lane holds."""
    comptime if dtype == DType.bfloat16:
        return 2
    else:
        return 1


@always_inline
def lane_count[dtype: DType](elements: Int) -> Int:
    """How many lanes hold that many elements, the last one padded."""
    comptime n = in_lane[dtype]()
    return (elements + n - 1) // n


@always_inline
def multiplied[dtype: DType](a: Vector, b: Vector, sum: Vector) -> Vector:
    """Adds the products of lanes, of one or two elements each."""
    comptime if dtype == DType.float32:
        return a.fma(b, sum)
    elif not multiplies_bfloat16():
        var ai = bitcast[DType.uint32, WIDTH](a)
        var bi = bitcast[DType.uint32, WIDTH](b)
        var low = bitcast[DType.float32, WIDTH](ai << 16).fma(
            bitcast[DType.float32, WIDTH](bi << 16), sum
        )
        return bitcast[DType.float32, WIDTH](ai & 0xFFFF0000).fma(
            bitcast[DType.float32, WIDTH](bi & 0xFFFF0000), low
        )
    elif CompilationTarget.is_x86():
        return llvm_intrinsic[
            "llvm.x86.avx512bf16.dpbf16ps.512", Vector, has_side_effect=False
        ](sum, bitcast[DType.bfloat16, 32](a), bitcast[DType.bfloat16, 32](b))
    else:
        var result = sum
        comptime for i in range(0, WIDTH, 4):
            comptime Four = SIMD[DType.float32, 4]
            var four = llvm_intrinsic[
                "llvm.aarch64.neon.bfdot.v4f32.v8bf16", Four, has_side_effect=False
            ](
                sum.slice[4, offset=i](),
                bitcast[DType.bfloat16, 8](a.slice[4, offset=i]()),
                bitcast[DType.bfloat16, 8](b.slice[4, offset=i]()),
            )
            result = result.insert[offset=i](four)
        return result


@always_inline
def load[dtype: DType](place: Address[dtype]) -> Vector:
    """16 elements as float32."""
    comptime if dtype == DType.bfloat16:
        var bits = bitcast[DType.uint16, WIDTH](place.unsafe_load[width=WIDTH]())
        return bitcast[DType.float32, WIDTH](bits.cast[DType.uint32]() << 16)
    else:
        return place.unsafe_load[width=WIDTH]().cast[DType.float32]()


@always_inline
def bfloat16_bits(value: Vector) -> SIMD[DType.uint16, WIDTH]:
    """16 elements as bfloat16, rounded to nearest, ties to even; NaN stays NaN."""
    comptime if CompilationTarget._has_feature["avx512bf16"]():
        return bitcast[DType.uint16, WIDTH](
            llvm_intrinsic[
                "llvm.x86.avx512bf16.cvtneps2bf16.512",
                SIMD[DType.bfloat16, WIDTH],
                has_side_effect=False,
            ](value)
        )
    else:
        # A cast would call a function for each element where there is no instruction.
        var bits = bitcast[DType.uint32, WIDTH](value)
        var nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        var quiet = bits >> 16 | 0x40
        return value.eq(value).select(nearest, quiet).cast[DType.uint16]()


@always_inline
def store[dtype: DType](place: Address[dtype], value: Vector):
    """16 elements, rounded to nearest, ties to even."""
    comptime if dtype == DType.bfloat16:
        place.unsafe_bitcast[UInt16]().unsafe_store(bfloat16_bits(value))
    else:
        place.unsafe_store(value.cast[dtype]())


@always_inline
def load_some[dtype: DType](place: Address[dtype], count: Int) -> Vector:
    """The first elements as float32, at most 16; zero after them."""
    if count >= WIDTH:
        return load(place)
    var value = Vector(0)
    for i in range(count):
        value[i] = place.unsafe_offset(i).unsafe_load().cast[DType.float32]()
    return value


@always_inline
def store_some[dtype: DType](place: Address[dtype], value: Vector, count: Int):
    """The first elements, at most 16."""
    if count >= WIDTH:
        store(place, value)
        return
    comptime if dtype == DType.bfloat16:
        var bits = bfloat16_bits(value)
        for i in range(count):
            place.unsafe_bitcast[UInt16]().unsafe_offset(i).unsafe_store(bits[i])
    else:
        for i in range(count):
            place.unsafe_offset(i).unsafe_store(value[i].cast[dtype]())


@always_inline
def is_below(count: Int) -> SIMD[DType.bool, WIDTH]:
    """Which of 16 places are below a count."""
    var places = SIMD[DType.int32, WIDTH](
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    )
    return places.lt(SIMD[DType.int32, WIDTH](Int32(count)))


@always_inline
def exponential(x: Vector) -> Vector:
    """Powers of e, relative error about 1e-7; NaN stays NaN.

    Below -87.3 and above 88.7 it is what it is there: no zero, no infinity.
    """
    # Cody and Waite: x = n ln 2 + r, and a polynomial of degree 6 in r.
    comptime ROUNDING = Float32(12582912.0)  # 1.5 * 2^23: the sum's last bits are n
    var t = min(max(x, Vector(-87.3)), Vector(88.7))
    var shifted = t.fma(Vector(1.44269504088896341), Vector(ROUNDING))
    var n = shifted - Vector(ROUNDING)
    var r = n.fma(Vector(-0.693359375), t)
    r = n.fma(Vector(2.12194440e-4), r)
    var p = Vector(1.9875691500e-4)
    p = p.fma(r, Vector(1.3981999507e-3))
    p = p.fma(r, Vector(8.3334519073e-3))
    p = p.fma(r, Vector(4.1665795894e-2))
    p = p.fma(r, Vector(1.6666665459e-1))
    p = p.fma(r, Vector(5.0000001201e-1))
    p = p.fma(r * r, r + Vector(1))
    var bits = bitcast[DType.int32, WIDTH](p) + (bitcast[DType.int32, WIDTH](shifted) << 23)
    return x.eq(x).select(bitcast[DType.float32, WIDTH](bits), x)
