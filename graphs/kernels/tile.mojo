"""The product of a few rows and a panel of columns, its sums in registers."""
from std.sys import CompilationTarget
from .lanes import Lanes, Vector, WIDTH, multiplied

comptime ROWS = 6
"""Most rows of a tile."""
comptime PANEL = 64
"""Columns of a panel, of which packed matrices are made."""
comptime VECTORS = PANEL // WIDTH


@always_inline
def has_wide_registers() -> Bool:
    """Whether 24 sums of 16 float32 fit in registers."""
    return CompilationTarget._has_feature["avx512f"]()


# Lanes that one turn of a loop adds up. On Intel's processors counting takes a tenth of
# the time from the units that multiply, where a turn is of one lane; on Arm's there are
# no registers for more.
comptime LANES_OF_TURN = 4 if CompilationTarget.is_x86() else 1


@always_inline
def _add_lane[
    dtype: DType, rows: Int, vectors: Int
](mut sums: Array[Vector, rows * vectors], a: Lanes, lda: Int, b: Lanes):
    var columns = Array[Vector, vectors](fill=Vector(0))
    comptime for j in range(vectors):
        columns[j] = b.unsafe_offset(j * WIDTH).unsafe_load[width=WIDTH]()
    comptime for i in range(rows):
        var row = Vector(a.unsafe_offset(i * lda).unsafe_load())
        comptime for j in range(vectors):
            sums[i * vectors + j] = multiplied[dtype](
                row, columns[j], sums[i * vectors + j]
            )


# Called, not put in place: a sum takes far longer than a call, and every operation has
# all numbers of rows.
@no_inline
def _tile[
    dtype: DType, rows: Int, vectors: Int, is_added: Bool
](
    lanes: Int,
    a: Lanes,
    lda: Int,
    b: Lanes,
    ldb: Int,
    c: Lanes,
    ldc: Int,
    segments: Int = 1,
    apart: Int = 0,
):
    var sums = Array[Vector, rows * vectors](fill=Vector(0))
    comptime if is_added:
        comptime for i in range(rows):
            comptime for j in range(vectors):
                sums[i * vectors + j] = c.unsafe_offset(
                    i * ldc + j * WIDTH
                ).unsafe_load[width=WIDTH]()
    for segment in range(segments):
        var from_a = a.unsafe_offset(segment * apart)
        var from_b = b.unsafe_offset(segment * lanes * ldb)
        # Of more rows the addresses alone take all registers.
        comptime together = LANES_OF_TURN if rows <= ROWS else 1
        var whole = lanes // together * together
        for k in range(0, whole, together):
            comptime for lane in range(together):
                _add_lane[dtype, rows, vectors](
                    sums,
                    from_a.unsafe_offset(k + lane),
                    lda,
                    from_b.unsafe_offset((k + lane) * ldb),
                )
        for k in range(whole, lanes):
            _add_lane[dtype, rows, vectors](
                sums, from_a.unsafe_offset(k), lda, from_b.unsafe_offset(k * ldb)
            )
    comptime for i in range(rows):
        comptime for j in range(vectors):
            c.unsafe_offset(i * ldc + j * WIDTH).unsafe_store(sums[i * vectors + j])


@always_inline
def _tile_of[
    dtype: DType, vectors: Int, is_added: Bool
](rows: Int, lanes: Int, a: Lanes, lda: Int, b: Lanes, ldb: Int, c: Lanes, ldc: Int):
    if rows == ROWS:
        _tile[dtype, ROWS, vectors, is_added](lanes, a, lda, b, ldb, c, ldc)
    else:
        comptime for some in range(1, ROWS):
            if rows == some:
                _tile[dtype, some, vectors, is_added](lanes, a, lda, b, ldb, c, ldc)


@always_inline
def multiply_tile[
    dtype: DType, vectors: Int, is_added: Bool
](rows: Int, lanes: Int, a: Lanes, lda: Int, b: Lanes, ldb: Int, c: Lanes, ldc: Int):
    """Computes c = a b, or c += a b: 1 to ROWS rows, 16 columns a vector.

    `a` are rows of lanes, `b` is (lanes, columns), `c` are rows of float32; lda, ldb
    and ldc are how far rows are apart.
    """
    comptime if has_wide_registers():
        _tile_of[dtype, vectors, is_added](rows, lanes, a, lda, b, ldb, c, ldc)
    else:
        # 16 columns at a time: six rows fill 12 registers of AVX2, 24 of NEON.
        comptime for j in range(vectors):
            _tile_of[dtype, 1, is_added](
                rows,
                lanes,
                a,
                lda,
                b.unsafe_offset(j * WIDTH),
                ldb,
                c.unsafe_offset(j * WIDTH),
                ldc,
            )


@always_inline
def _segments_of[
    dtype: DType, vectors: Int
](
    rows: Int,
    segments: Int,
    lanes: Int,
    a: Lanes,
    lda: Int,
    apart: Int,
    b: Lanes,
    c: Lanes,
):
    comptime for some in range(1, ROWS + 1):
        if rows == some:
            _tile[dtype, some, vectors, True](
                lanes, a, lda, b, PANEL, c, PANEL, segments, apart
            )


@always_inline
def add_segments[
    dtype: DType
](
    rows: Int,
    columns: Int,
    segments: Int,
    lanes: Int,
    a: Lanes,
    lda: Int,
    apart: Int,
    b: Lanes,
    c: Lanes,
):
    """Computes c += a b of rows in segments of that many lanes, `apart` lanes apart.

    `b` is (segments * lanes, 64), of which at least `columns` are computed, and `c` rows
    of 64 float32.
    """
    comptime if has_wide_registers():
        if columns <= WIDTH:
            _segments_of[dtype, 1](rows, segments, lanes, a, lda, apart, b, c)
        elif columns <= 2 * WIDTH:
            _segments_of[dtype, 2](rows, segments, lanes, a, lda, apart, b, c)
        else:
            _segments_of[dtype, VECTORS](rows, segments, lanes, a, lda, apart, b, c)
    else:
        for column in range(0, min(columns, PANEL), WIDTH):
            _segments_of[dtype, 1](
                rows,
                segments,
                lanes,
                a,
                lda,
                apart,
                b.unsafe_offset(column),
                c.unsafe_offset(column),
            )
