"""Products by a processor's unit for small matrices: Intel's AMX, of bfloat16.

MAX 26.7 compiles for the processor that a machine claims to have. A virtual one may
claim one without the unit that it has, and the compiler then refuses the instructions:
here they are bytes, of fixed registers. Registers 0 to 3 of the unit hold sums, two
above two; 4 and 5 rows above rows; 6 and 7 columns beside columns.
"""
from std.ffi import external_call
from std.memory.alloc import unsafe_alloc
from std.sys import CompilationTarget, inlined_assembly
from .lanes import Address, Lanes, WIDTH

comptime MATRIX_ROWS = 32
"""Most rows of one call, whose sums the unit holds for 32 columns."""
# Of one register.
comptime _HALF = 16
# Of arch_prctl, and the bit of the unit's registers in what it tells.
comptime _ARCH_PRCTL = 158
comptime _GET_PERMITTED = 0x1022
comptime _REGISTERS = 18


def may_use_matrix_unit() -> Bool:
    """Whether this process was permitted to: by a request, after it was found that the
    processor multiplies bfloat16 with it. Takes a tenth of a microsecond."""
    comptime if CompilationTarget.is_x86() and CompilationTarget.is_linux():
        var permitted = unsafe_alloc[Scalar[DType.uint64]](1)
        permitted.unsafe_store(UInt64(0))
        var error = external_call["syscall", Int](
            Int(_ARCH_PRCTL), Int(_GET_PERMITTED), permitted
        )
        var is_permitted = error == 0 and permitted.unsafe_load() >> _REGISTERS & 1 == 1
        permitted.unsafe_free()
        return is_permitted
    else:
        return False


@fieldwise_init
struct MatrixUnit(Copyable, ImplicitlyCopyable, Movable):
    """The unit of one thread, from `begin` to `end`."""

    var shapes: Address[DType.uint8]
    """Of its registers, as the processor takes them; zeros before the first product."""

    @staticmethod
    def begin() -> Self:
        var shapes = unsafe_alloc[Scalar[DType.uint8]](64, alignment=64)
        for i in range(64):
            shapes.unsafe_offset(i).unsafe_store(UInt8(0))
        return Self(shapes)

    def end(self):
        """Leaves nothing in it that a change of threads would have to keep."""
        comptime if CompilationTarget.is_x86():
            if self.shapes.unsafe_load() != 0:
                # tilerelease
                inlined_assembly[
                    ".byte 0xc4,0xe2,0x78,0x49,0xc0", NoneType, constraints="~{memory}"
                ]()
        self.shapes.unsafe_free()

    def multiply[
        is_added: Bool
    ](
        self, rows: Int, vectors: Int, lanes: Int, a: Lanes, lda: Int, b: Lanes, ldb: Int,
        c: Lanes, ldc: Int,
    ):
        """Computes c = a b, or c += a b: 1 to MATRIX_ROWS rows, 16 columns a vector.

        Lanes are pairs of bfloat16. `a` are rows of them, `b` is (lanes, columns), `c`
        are rows of float32; lda, ldb and ldc are how far rows are apart. Numbers that
        are not normal count as zeros.
        """
        comptime if not CompilationTarget.is_x86():
            return  # nobody may
        var whole = lanes // WIDTH
        var rest = lanes % WIDTH
        if whole > 0 or rest == 0:
            self._shape(rows, WIDTH)
            _multiply[is_added](rows, vectors, whole, a, lda, b, ldb, c, ldc)
        if rest == 0:
            return
        self._shape(rows, rest)
        if whole == 0:
            _multiply[is_added](rows, vectors, 1, a, lda, b, ldb, c, ldc)
        else:
            var done = whole * WIDTH
            _multiply[True](
                rows, vectors, 1, a.unsafe_offset(done), lda,
                b.unsafe_offset(done * ldb), ldb, c, ldc,
            )

    @always_inline
    def _shape(self, rows: Int, lanes: Int):
        """Shapes the registers for that many rows of that many lanes, which empties
        them; does nothing where they have the shapes."""
        var above = min(rows, _HALF)
        # A register without rows would be an error, even of one that is not used.
        var below = max(rows - _HALF, 1)
        if (
            Int(self._rows_of(0).unsafe_load()) == above
            and Int(self._rows_of(2).unsafe_load()) == below
            and Int(self._rows_of(6).unsafe_load()) == lanes
        ):
            return
        self.shapes.unsafe_store(UInt8(1))  # the only kind of shapes that there is
        comptime for register in range(8):
            comptime is_columns = register >= 6
            comptime is_rows = register == 4 or register == 5
            var height = lanes if is_columns else (
                below if register == 2 or register == 3 or register == 5 else above
            )
            self._rows_of(register).unsafe_store(UInt8(height))
            # Bytes of a row.
            self.shapes.unsafe_offset(16 + 2 * register).unsafe_store(
                UInt8(4 * lanes if is_rows else 4 * WIDTH)
            )
        # ldtilecfg [rax]
        inlined_assembly[
            ".byte 0xc4,0xe2,0x78,0x49,0x00", NoneType, constraints="{rax},~{memory}"
        ](self.shapes)

    @always_inline
    def _rows_of(self, register: Int) -> Address[DType.uint8]:
        return self.shapes.unsafe_offset(48 + register)


@always_inline
def _multiply[
    is_added: Bool
](
    rows: Int, vectors: Int, steps: Int, a: Lanes, lda: Int, b: Lanes, ldb: Int, c: Lanes,
    ldc: Int,
):
    """Of `steps` times as many lanes as the registers are shaped for."""
    for j in range(0, vectors, 2):
        var columns = b.unsafe_offset(j * WIDTH)
        var sums = c.unsafe_offset(j * WIDTH)
        if rows > _HALF and j + 1 < vectors:
            _sums[True, True, is_added](steps, a, lda, columns, ldb, sums, ldc)
        elif rows > _HALF:
            _sums[True, False, is_added](steps, a, lda, columns, ldb, sums, ldc)
        elif j + 1 < vectors:
            _sums[False, True, is_added](steps, a, lda, columns, ldb, sums, ldc)
        else:
            _sums[False, False, is_added](steps, a, lda, columns, ldb, sums, ldc)


@no_inline
def _sums[
    has_below: Bool, has_beside: Bool, is_added: Bool
](
    steps: Int, a: Lanes, lda: Int, b: Lanes, ldb: Int, c: Lanes, ldc: Int,
):
    """Sums of 16 rows, or 16 above as many more, and of 16 columns or 32."""
    comptime if is_added:
        _move[False, False, has_beside](c, ldc)
        comptime if has_below:
            _move[False, True, has_beside](c.unsafe_offset(_HALF * ldc), ldc)
    else:
        # tilezero 0, 1, 2, 3
        inlined_assembly[
            (
                ".byte 0xc4,0xe2,0x7b,0x49,0xc0\n.byte 0xc4,0xe2,0x7b,0x49,0xc8\n"
                ".byte 0xc4,0xe2,0x7b,0x49,0xd0\n.byte 0xc4,0xe2,0x7b,0x49,0xd8"
            ),
            NoneType,
            constraints="~{memory}",
        ]()
    for step in range(steps):
        var above = a.unsafe_offset(step * WIDTH)
        var below = above.unsafe_offset(_HALF * lda)
        var columns = b.unsafe_offset(step * WIDTH * ldb)
        # tileloadd 4, [rax + rcx]; 6, [rsi + rdi]; 7, [rsi + rdi + 64]; 5, [rdx + rcx];
        # tdpbf16ps 0, 4, 6; 1, 4, 7; 2, 5, 6; 3, 5, 7
        comptime if has_below and has_beside:
            inlined_assembly[
                (
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x24,0x08\n"
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x34,0x3e\n"
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x7c,0x3e,0x40\n"
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x2c,0x0a\n"
                    ".byte 0xc4,0xe2,0x4a,0x5c,0xc4\n.byte 0xc4,0xe2,0x42,0x5c,0xcc\n"
                    ".byte 0xc4,0xe2,0x4a,0x5c,0xd5\n.byte 0xc4,0xe2,0x42,0x5c,0xdd"
                ),
                NoneType,
                constraints="{rax},{rdx},{rcx},{rsi},{rdi},~{memory}",
            ](above, below, lda * 4, columns, ldb * 4)
        elif has_below:
            inlined_assembly[
                (
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x24,0x08\n"
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x34,0x3e\n"
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x2c,0x0a\n"
                    ".byte 0xc4,0xe2,0x4a,0x5c,0xc4\n.byte 0xc4,0xe2,0x4a,0x5c,0xd5"
                ),
                NoneType,
                constraints="{rax},{rdx},{rcx},{rsi},{rdi},~{memory}",
            ](above, below, lda * 4, columns, ldb * 4)
        elif has_beside:
            inlined_assembly[
                (
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x24,0x08\n"
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x34,0x3e\n"
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x7c,0x3e,0x40\n"
                    ".byte 0xc4,0xe2,0x4a,0x5c,0xc4\n.byte 0xc4,0xe2,0x42,0x5c,0xcc"
                ),
                NoneType,
                constraints="{rax},{rcx},{rsi},{rdi},~{memory}",
            ](above, lda * 4, columns, ldb * 4)
        else:
            inlined_assembly[
                (
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x24,0x08\n"
                    ".byte 0xc4,0xe2,0x7b,0x4b,0x34,0x3e\n"
                    ".byte 0xc4,0xe2,0x4a,0x5c,0xc4"
                ),
                NoneType,
                constraints="{rax},{rcx},{rsi},{rdi},~{memory}",
            ](above, lda * 4, columns, ldb * 4)
    _move[True, False, has_beside](c, ldc)
    comptime if has_below:
        _move[True, True, has_beside](c.unsafe_offset(_HALF * ldc), ldc)


@always_inline
def _move[is_stored: Bool, is_below: Bool, has_beside: Bool](c: Lanes, ldc: Int):
    """Loads or stores sums: of 0 and 1, or of 2 and 3 below, at c and 16 columns on."""
    # tileloadd or tilestored [rax + rcx], [rax + rcx + 64]
    comptime move = ".byte 0xc4,0xe2,0x7a" if is_stored else ".byte 0xc4,0xe2,0x7b"
    comptime first = ",0x4b,0x14,0x08" if is_below else ",0x4b,0x04,0x08"
    comptime second = ",0x4b,0x5c,0x08,0x40" if is_below else ",0x4b,0x4c,0x08,0x40"
    inlined_assembly[move + first, NoneType, constraints="{rax},{rcx},~{memory}"](
        c, ldc * 4
    )
    comptime if has_beside:
        inlined_assembly[move + second, NoneType, constraints="{rax},{rcx},~{memory}"](
            c, ldc * 4
        )
