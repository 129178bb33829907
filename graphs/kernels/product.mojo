"""Rows times a packed matrix, and what becomes of the sums.

A matrix of (columns, inputs) is packed as (panels, lanes of inputs, 64 columns): each
panel is read once from front to end. The last one is padded with zeros.
"""
from std.math import ceildiv
from std.memory.alloc import unsafe_alloc
from std.sys.intrinsics import PrefetchOptions, prefetch
from .lanes import Address, Lanes, Vector, WIDTH, exponential, load, store, store_some
from .matrix_unit import MATRIX_ROWS, MatrixUnit
from .team import Team
from .tile import PANEL, ROWS, VECTORS, has_wide_registers, multiply_tile

comptime NO_ACTIVATION = 0
comptime GELU = 1
"""The approximation by tanh."""
comptime SILU = 2
comptime QUICK_GELU = 3
comptime RELU = 4
# Lanes of a panel that stay in the second-level cache while all rows pass: longer sums
# go through them block by block.
comptime BLOCK = 1024
# Lanes of panels that stay there while a matrix unit takes all rows, and most panels:
# sums of a tile are done so soon that its rows are wanted for more than one panel.
comptime NEAR = 4 * BLOCK
comptime MOST_TOGETHER = 4
# Units that a thread takes at a time, where all of them are few.
comptime MOST_UNITS = 16
# Vectors of a panel that go through all rows before the next ones. Where registers hold
# the sums of one only, its columns then stay in the first-level cache.
comptime TOGETHER = VECTORS if has_wide_registers() else 1


@fieldwise_init
struct Rows(Copyable, ImplicitlyCopyable, Movable):
    """Rows of lanes, `stride` lanes apart."""

    var start: Lanes
    var stride: Int
    var lanes: Int

    @always_inline
    def at(self, row: Int) -> Lanes:
        return self.start.unsafe_offset(row * self.stride)


@always_inline
def activated(kind: Int, x: Vector) -> Vector:
    """The activation of 16 sums."""
    if kind == GELU:
        # x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
        var exponent = x * (Vector(-1.5957691216057308) - Vector(0.07135481627260025) * x * x)
        return x / (Vector(1) + exponential(exponent))
    if kind == SILU:
        return x / (Vector(1) + exponential(-x))
    if kind == QUICK_GELU:
        return x / (Vector(1) + exponential(x * Vector(-1.702)))
    if kind == RELU:
        return x.lt(Vector(0)).select(Vector(0), x)
    return x


@fieldwise_init
struct Finish[dtype: DType](Copyable, ImplicitlyCopyable, Movable):
    """What becomes of the sums of a row; fields are read as the program runs.

    A parameter for each of them would have the compiler make every combination.
    """

    var y: Address[Self.dtype]
    """Rows of `columns`."""
    var first: Int
    """Column of the matrix that is the first of y."""
    var columns: Int
    var has_bias: Bool
    var bias: Lanes
    """Of every column of the matrix."""
    var activation: Int
    var activated_from: Int
    """Columns of y before are left as they are."""
    var is_gated: Bool
    """Whether y = residual + gate * sums."""
    var gate: Lanes
    """Rows of a factor for every column of y."""
    var gate_stride: Int
    var rows_of_gate: Int
    """Rows of y that one row of the gate is for."""
    var residual: Address[Self.dtype]

    @no_inline
    def write[
        vectors: Int = VECTORS
    ](self, rows: Int, row: Int, start: Int, sums: Lanes):
        """Sums of rows from `row` on, a panel apart, of 16 columns a vector: those of
        the matrix from `start` on."""
        comptime for j in range(vectors):
            var column = start + j * WIDTH - self.first
            var is_whole = column >= 0 and column + WIDTH <= self.columns
            var own = sums.unsafe_offset(j * WIDTH)
            if is_whole and column >= self.activated_from:
                self._whole(rows, row, column, self.activation, own)
            elif is_whole and column + WIDTH <= self.activated_from:
                self._whole(rows, row, column, NO_ACTIVATION, own)
            elif column > -WIDTH and column < self.columns:
                self._some(rows, row, column, own)

    @always_inline
    def _whole(self, rows: Int, row: Int, column: Int, activation: Int, sums: Lanes):
        """16 columns of y."""
        var bias = Vector(0)
        if self.has_bias:
            bias = load(self.bias.unsafe_offset(self.first + column))
        for i in range(rows):
            var value = sums.unsafe_offset(i * PANEL).unsafe_load[width=WIDTH]() + bias
            value = activated(activation, value)
            var place = (row + i) * self.columns + column
            if self.is_gated:
                var gate = load(
                    self.gate.unsafe_offset(
                        (row + i) // self.rows_of_gate * self.gate_stride + column
                    )
                )
                value = gate.fma(value, load(self.residual.unsafe_offset(place)))
            store(self.y.unsafe_offset(place), value)

    def _some(self, rows: Int, row: Int, column: Int, sums: Lanes):
        """16 columns, of which some are not of y, or only some are activated."""
        for i in range(rows):
            for j in range(max(0, -column), min(WIDTH, self.columns - column)):
                var at = column + j
                var value = Vector(sums.unsafe_offset(i * PANEL + j).unsafe_load())
                if self.has_bias:
                    value += Vector(self.bias.unsafe_offset(self.first + at).unsafe_load())
                if at >= self.activated_from:
                    value = activated(self.activation, value)
                var place = (row + i) * self.columns + at
                if self.is_gated:
                    var gate = self.gate.unsafe_offset(
                        (row + i) // self.rows_of_gate * self.gate_stride + at
                    ).unsafe_load()
                    var residual = self.residual.unsafe_offset(place).unsafe_load()
                    value = Vector(gate).fma(value, Vector(residual.cast[DType.float32]()))
                store_some(self.y.unsafe_offset(place), value, 1)


@fieldwise_init
struct Product[compute: DType, result: DType](Copyable, ImplicitlyCopyable, Movable):
    """Rows, and rows beside them, times a packed matrix."""

    var count: Int
    """Of the rows."""
    var a: Rows
    var beside: Rows
    """Their lanes follow those of `a`; none where their count is 0."""
    var matrix: Lanes
    var finish: Finish[Self.result]
    var has_unit: Bool
    """Whether a matrix unit multiplies; only bfloat16."""

    @always_inline
    def tiles(self) -> Int:
        return ceildiv(self.count, MATRIX_ROWS if self.has_unit else ROWS)

    @always_inline
    def units(self) -> Int:
        """Of work: tiles of rows, times panels."""
        var first = self.finish.first // PANEL
        return self.tiles() * (ceildiv(self.finish.first + self.finish.columns, PANEL) - first)

    @always_inline
    def share(self, team: Team, me: Int, phase: Int):
        """Computes all of it, as one phase of a team's work."""

        def work(begin: Int, end: Int) {imm}:
            self.compute_units(begin, end)

        var units = self.units()
        team.share(me, phase, units, max(MOST_UNITS, units // (team.size * 12)), work)

    def compute_units(self, begin: Int, end: Int):
        """Units begin to end: panel by panel, and tile by tile in each."""
        comptime if Self.compute == DType.bfloat16:
            if self.has_unit:
                self._sums_by_matrix_unit(begin, end)
                return
        if self.a.lanes + self.beside.lanes <= BLOCK + BLOCK // 4:
            self._whole_sums(begin, end)
        else:
            self._sums_by_blocks(begin, end)

    def _sums_by_matrix_unit(self, begin: Int, end: Int):
        """Units begin to end: some panels together, and in each tile panel by panel."""
        var lanes = self.a.lanes + self.beside.lanes
        var tiles = self.tiles()
        var first_panel = self.finish.first // PANEL
        var panels = self.units() // tiles
        var together = min(max(NEAR // max(lanes, 1), 1), MOST_TOGETHER)
        var unit = MatrixUnit.begin()
        var sums = unsafe_alloc[Scalar[DType.float32]](MATRIX_ROWS * PANEL, alignment=64)
        for index in range(begin, end):
            var before = index // (tiles * together) * together
            var beside = min(together, panels - before)
            var place = index - before * tiles
            var panel = first_panel + before + place % beside
            var row = place // beside * MATRIX_ROWS
            var rows = min(MATRIX_ROWS, self.count - row)
            var b = self.matrix.unsafe_offset(panel * lanes * PANEL)
            unit.multiply[False](
                rows, VECTORS, self.a.lanes, self.a.at(row), self.a.stride, b, PANEL, sums, PANEL
            )
            if self.beside.lanes > 0:
                unit.multiply[True](
                    rows,
                    VECTORS,
                    self.beside.lanes,
                    self.beside.at(row),
                    self.beside.stride,
                    b.unsafe_offset(self.a.lanes * PANEL),
                    PANEL,
                    sums,
                    PANEL,
                )
            self.finish.write(rows, row, panel * PANEL, sums)
        sums.unsafe_free()
        unit.end()

    def _whole_sums(self, begin: Int, end: Int):
        var lanes = self.a.lanes + self.beside.lanes
        var tiles = self.tiles()
        var first_panel = self.finish.first // PANEL
        var last_panel = (self.finish.first + self.finish.columns - 1) // PANEL
        var sums = unsafe_alloc[Scalar[DType.float32]](ROWS * PANEL, alignment=64)
        var unit = begin
        while unit < end:
            var panel = first_panel + unit // tiles
            var tile = unit % tiles
            var last_tile = min(tiles, tile + (end - unit))
            unit += last_tile - tile
            var b = self.matrix.unsafe_offset(panel * lanes * PANEL)
            if last_tile - tile == 1:
                self._whole_tile[VECTORS](tile, panel * PANEL, b, sums)
                continue
            for j in range(0, VECTORS, TOGETHER):
                for t in range(tile, last_tile):
                    if j == 0 and tiles > 3 and panel < last_panel:
                        fetch_part(b.unsafe_offset(lanes * PANEL), lanes * PANEL, t, tiles)
                    self._whole_tile[TOGETHER](
                        t, panel * PANEL + j * WIDTH, b.unsafe_offset(j * WIDTH), sums
                    )
        sums.unsafe_free()

    @always_inline
    def _whole_tile[vectors: Int](self, tile: Int, column: Int, b: Lanes, sums: Lanes):
        """A tile's columns from `column` of the matrix on."""
        var row = tile * ROWS
        var rows = min(ROWS, self.count - row)
        multiply_tile[Self.compute, vectors, False](
            rows, self.a.lanes, self.a.at(row), self.a.stride, b, PANEL, sums, PANEL
        )
        if self.beside.lanes > 0:
            multiply_tile[Self.compute, vectors, True](
                rows,
                self.beside.lanes,
                self.beside.at(row),
                self.beside.stride,
                b.unsafe_offset(self.a.lanes * PANEL),
                PANEL,
                sums,
                PANEL,
            )
        self.finish.write[vectors](rows, row, column, sums)

    def _sums_by_blocks(self, begin: Int, end: Int):
        var lanes = self.a.lanes + self.beside.lanes
        var tiles = self.tiles()
        var first_panel = self.finish.first // PANEL
        var last_panel = (self.finish.first + self.finish.columns - 1) // PANEL
        var together = min(tiles, end - begin)
        var sums = unsafe_alloc[Scalar[DType.float32]](together * ROWS * PANEL, alignment=64)
        var unit = begin
        while unit < end:
            var panel = first_panel + unit // tiles
            var first_tile = unit % tiles
            var last_tile = min(tiles, first_tile + (end - unit))
            unit += last_tile - first_tile
            var b = self.matrix.unsafe_offset(panel * lanes * PANEL)
            var is_first = True
            for operand in range(2):
                var a = self.a if operand == 0 else self.beside
                var done = 0
                while done < a.lanes:
                    var block = min(BLOCK, a.lanes - done)
                    var is_last = panel == last_panel and (
                        operand == 1 or self.beside.lanes == 0
                    ) and done + block == a.lanes
                    for tile in range(first_tile, last_tile):
                        var row = tile * ROWS
                        var rows = min(ROWS, self.count - row)
                        var place = sums.unsafe_offset((tile - first_tile) * ROWS * PANEL)
                        var source = a.at(row).unsafe_offset(done)
                        if not is_last and last_tile - first_tile > 3:
                            fetch_part(
                                b.unsafe_offset(block * PANEL),
                                BLOCK * PANEL,
                                tile - first_tile,
                                last_tile - first_tile,
                            )
                        if is_first:
                            multiply_tile[Self.compute, VECTORS, False](
                                rows, block, source, a.stride, b, PANEL, place, PANEL
                            )
                        else:
                            multiply_tile[Self.compute, VECTORS, True](
                                rows, block, source, a.stride, b, PANEL, place, PANEL
                            )
                    is_first = False
                    b = b.unsafe_offset(block * PANEL)
                    done += block
            var row = first_tile * ROWS
            self.finish.write(
                min(self.count, last_tile * ROWS) - row,
                row,
                panel * PANEL,
                sums,
            )
        sums.unsafe_free()


@always_inline
def fetch_part(next: Lanes, lanes: Int, part: Int, parts: Int):
    """Brings a part of what comes next nearer to the processor."""
    comptime nearer = PrefetchOptions().for_read().medium_locality().to_data_cache()
    for lane in range(part * lanes // parts // WIDTH * WIDTH, (part + 1) * lanes // parts, WIDTH):
        prefetch[nearer](next.unsafe_offset(lane))
