"""Convolution of images and of videos: rows of pixels times packed matrices.

The image is written once into rows of lanes, normed and with zeros around it. There a
pixel and those to the right of it follow one another, so that the inputs of one row of
the filter are neighbouring lanes, read where they are. A large image passes strip by
strip, so that what is written stays in the processor's caches. A filter over time is a
matrix for each of its frames: their products are of the same sums.
"""
from std.math import ceildiv
from std.memory.alloc import unsafe_alloc
from .images import Image
from .lanes import Lanes, Vector, WIDTH, in_lane
from .matrix_unit import MATRIX_ROWS, MatrixUnit
from .product import BLOCK, Finish
from .team import Team
from .tile import PANEL, ROWS, VECTORS, _tile, add_segments, has_wide_registers

comptime FRAMES = 3
"""Frames of a filter over time."""
# Lanes of a strip: 8 MiB, unless it takes more for rows enough: those at its edges are
# written for two strips.
comptime STRIP = 1 << 21
comptime STRIP_ROWS = 8
# Rows of tiles whose sums are kept while long filters pass block by block: 192 KiB.
comptime TOGETHER = 128 * ROWS
# Rows of a tile whose columns take two registers or fewer.
comptime NARROW_ROWS = 2 * ROWS


@fieldwise_init
struct Filters(Copyable, ImplicitlyCopyable, Movable):
    """The packed matrix of each frame of a filter; images have the first only."""

    var first: Lanes
    var second: Lanes
    var third: Lanes

    @always_inline
    def __getitem__(self, frame: Int) -> Lanes:
        if frame == 0:
            return self.first
        return self.second if frame == 1 else self.third


@fieldwise_init
struct Strip(Copyable, ImplicitlyCopyable, Movable):
    """Rows of the result that are computed together, of one sample or of several."""

    var sample: Int
    var samples: Int
    var row: Int
    var rows: Int
    """Of each sample."""


@fieldwise_init
struct Tile(Copyable, ImplicitlyCopyable, Movable):
    """Neighbouring pixels of one row of the result."""

    var a: Lanes
    """Their first filter's first row."""
    var pixel: Int
    """The first one's number in the result."""
    var pixels: Int


@fieldwise_init
struct Part(Copyable, ImplicitlyCopyable, Movable):
    """Some lanes of a filter's rows that are multiplied in one go."""

    var frame: Int
    var row: Int
    var rows: Int
    var begin: Int
    """The first lane of each row."""
    var lanes: Int
    """Of each row."""


@fieldwise_init
struct Convolution[dtype: DType, compute: DType, result: DType](
    Copyable, ImplicitlyCopyable, Movable
):
    """A convolution with k x k filters, of one frame or several, packed as
    `product.mojo` tells.

    Inputs of a frame's matrix are filters' rows, in each its columns, in each the
    channels of `image.inputs`.
    """

    var image: Image[Self.dtype, Self.compute]
    var samples: Int
    """Images, or frames, of the result."""
    var kernel: Int
    var stride: Int
    var height: Int
    """Of the result."""
    var width: Int
    var is_direct: Bool
    """Whether the image is rows of lanes as it is, and nothing is written."""
    var buffer: Lanes
    """A strip's rows of lanes."""
    var matrices: Filters
    var finish: Finish[Self.result]
    var has_unit: Bool
    """Whether a matrix unit multiplies; only bfloat16."""

    @always_inline
    def filters(self) -> Int:
        """Frames of a filter."""
        return self.image.frames.filters

    @always_inline
    def lanes(self) -> Int:
        """Of a pixel."""
        return self.image.inputs // in_lane[Self.compute]()

    @always_inline
    def row_lanes(self) -> Int:
        """Of a row of the image as it is written."""
        return self.lanes() * self.image.padded_width

    @always_inline
    def filter_row(self) -> Int:
        """Lanes of a row of a filter."""
        return self.kernel * self.lanes()

    @always_inline
    def rows_under(self, rows: Int) -> Int:
        """How many rows of the image that many of the result are of."""
        return (rows - 1) * self.stride + self.kernel

    @always_inline
    def rows_together(self) -> Int:
        """Rows of the result in a strip, of one sample."""
        if self.is_direct:
            return self.height
        # All frames that a filter over time sees are in each strip.
        var images = 1
        if self.filters() > 1:
            images = self.image.frames.under(self.samples)
        var rows = (STRIP // (self.row_lanes() * images) - self.kernel) // self.stride + 1
        return min(max(rows, STRIP_ROWS), self.height)

    @always_inline
    def samples_together(self) -> Int:
        """Samples in a strip."""
        if self.is_direct or self.filters() > 1:
            return self.samples
        if self.rows_together() < self.height:
            return 1
        var size = self.rows_under(self.height) * self.row_lanes()
        return min(max(STRIP // size, 1), self.samples)

    @always_inline
    def buffer_lanes(self) -> Int:
        """Lanes that the buffer must have."""
        var images = self.image.frames.under(self.samples_together())
        return images * self.rows_under(self.rows_together()) * self.row_lanes()

    @always_inline
    def strips(self) -> Int:
        return ceildiv(self.samples, self.samples_together()) * self._strips_of_sample()

    @always_inline
    def _strips_of_sample(self) -> Int:
        return ceildiv(self.height, self.rows_together())

    @always_inline
    def strip(self, index: Int) -> Strip:
        var sample = index // self._strips_of_sample() * self.samples_together()
        var row = index % self._strips_of_sample() * self.rows_together()
        return Strip(
            sample,
            min(self.samples_together(), self.samples - sample),
            row,
            min(self.rows_together(), self.height - row),
        )

    @always_inline
    def phases(self) -> Int:
        var of_norm = 2 if self.image.norm.groups > 0 else 0
        return of_norm + self.strips() * (1 if self.is_direct else 2)

    def share(self, team: Team, me: Int):
        """Computes all of it, as all phases of a team's work."""
        var phase = 0
        if self.image.norm.groups > 0:
            var norm = self.image.norm

            def measure(begin: Int, end: Int) {imm}:
                for unit in range(begin, end):
                    norm.measure(unit)

            def combine(begin: Int, end: Int) {imm}:
                for sample in range(begin, end):
                    norm.combine(sample)

            team.share(me, 0, norm.samples * norm.blocks(), 1, measure)
            team.share(me, 1, norm.samples, 1, combine)
            phase = 2
        for index in range(self.strips()):
            var strip = self.strip(index)

            def write(begin: Int, end: Int) {imm}:
                self._write_rows(strip, begin, end)

            def multiply(begin: Int, end: Int) {imm}:
                self._compute_units(strip, begin, end)

            if not self.is_direct:
                var images = self.image.frames.under(strip.samples)
                team.share(me, phase, images * self.rows_under(strip.rows), 1, write)
                phase += 1
            var units = self._units_of_panel(strip) * ceildiv(self.finish.columns, PANEL)
            var most = TOGETHER // self.tile_rows()
            var grain = min(max(units // (team.size * 12), 1), most)
            team.share(me, phase, units, grain, multiply)
            phase += 1

    def _write_rows(self, strip: Strip, begin: Int, end: Int):
        var rows = self.rows_under(strip.rows)
        for unit in range(begin, end):
            var to = self.buffer.unsafe_offset(unit * self.row_lanes())
            self.image.write_row(
                strip.sample + unit // rows,
                strip.row * self.stride + unit % rows,
                to.unsafe_bitcast[Scalar[Self.compute]](),
            )

    @always_inline
    def tile_rows(self) -> Int:
        """Most pixels of a tile."""
        if self.has_unit:
            return MATRIX_ROWS
        comptime if has_wide_registers():
            if self.finish.columns <= 2 * WIDTH:
                return NARROW_ROWS
        return ROWS

    @always_inline
    def _tiles(self) -> Int:
        """Of a row of the result."""
        return ceildiv(self.width, self.tile_rows())

    @always_inline
    def _units_of_panel(self, strip: Strip) -> Int:
        return strip.samples * strip.rows * self._tiles()

    def _compute_units(self, strip: Strip, begin: Int, end: Int):
        """Tiles begin to end of a strip: panel by panel, and pixel by pixel in each."""
        var of_panel = self._units_of_panel(strip)
        var rows = self.tile_rows()
        # Filters that fit in the second-level cache stay there while all tiles pass one
        # by one; of others, blocks of them.
        var together = TOGETHER // rows
        if self.filters() * self.kernel * self.filter_row() <= BLOCK + BLOCK // 4:
            together = 1
        var sums = unsafe_alloc[Scalar[DType.float32]](
            min(together, end - begin) * rows * PANEL, alignment=64
        )
        var matrix_unit = MatrixUnit.begin()
        var unit = begin
        while unit < end:
            var panel = unit // of_panel
            var first = unit % of_panel
            var count = min(min(of_panel - first, end - unit), together)
            self._compute_tiles(strip, panel, first, count, sums, matrix_unit)
            unit += count
        matrix_unit.end()
        sums.unsafe_free()

    def _compute_tiles(
        self, strip: Strip, panel: Int, first: Int, count: Int, sums: Lanes, unit: MatrixUnit
    ):
        """Computes tiles of one panel of columns."""
        var filter_row = self.filter_row()
        var filter = self.kernel * filter_row
        var sums_of_tile = self.tile_rows() * PANEL
        var columns = self.finish.columns - panel * PANEL
        # All rows of a short filter in one go; else blocks of each row.
        var is_short = filter <= BLOCK + BLOCK // 4
        var blocks = 1 if is_short else ceildiv(filter_row, BLOCK)
        var parts = 1 if is_short else self.kernel * blocks
        for i in range(0, count * sums_of_tile, WIDTH):
            sums.unsafe_offset(i).unsafe_store(Vector(0))
        for index in range(self.filters() * parts):
            var frame = index // parts
            var row = index % parts // blocks
            var begin = index % blocks * filter_row // blocks
            var stop = (index % blocks + 1) * filter_row // blocks
            var rows = self.kernel if is_short else 1
            var part = Part(frame, row, rows, begin, stop - begin)
            var b = self.matrices[frame].unsafe_offset(
                (panel * filter + row * filter_row + begin) * PANEL
            )
            for i in range(count):
                self._add(
                    self._tile(strip, first + i),
                    columns,
                    part,
                    self._image_lanes(strip),
                    b,
                    sums.unsafe_offset(i * sums_of_tile),
                    unit,
                )
        for i in range(count):
            var tile = self._tile(strip, first + i)
            self.finish.write(
                tile.pixels, tile.pixel, panel * PANEL, sums.unsafe_offset(i * sums_of_tile)
            )

    @always_inline
    def _image_lanes(self, strip: Strip) -> Int:
        """Of all rows of an image in a strip."""
        if self.is_direct:
            return self.image.height * self.row_lanes()
        return self.rows_under(strip.rows) * self.row_lanes()

    @always_inline
    def _add(
        self,
        tile: Tile,
        columns: Int,
        part: Part,
        image_lanes: Int,
        b: Lanes,
        sums: Lanes,
        unit: MatrixUnit,
    ):
        """Adds the products of a part of the filters to a tile's sums."""
        var apart = self.row_lanes()
        var a = tile.a.unsafe_offset(
            part.frame * image_lanes + part.row * apart + part.begin
        )
        var lda = self.stride * self.lanes()
        comptime if Self.compute == DType.bfloat16:
            if self.has_unit:
                self._add_by_matrix_unit(tile.pixels, columns, part, a, lda, b, sums, unit)
                return
        if self.tile_rows() == ROWS:
            add_segments[Self.compute](
                tile.pixels, columns, part.rows, part.lanes, a, lda, apart, b, sums
            )
            return
        comptime if has_wide_registers():
            if columns <= WIDTH:
                _add_narrow[Self.compute, 1](tile.pixels, part, a, lda, apart, b, sums)
            else:
                _add_narrow[Self.compute, 2](tile.pixels, part, a, lda, apart, b, sums)

    @always_inline
    def _add_by_matrix_unit(
        self,
        pixels: Int,
        columns: Int,
        part: Part,
        a: Lanes,
        lda: Int,
        b: Lanes,
        sums: Lanes,
        unit: MatrixUnit,
    ):
        # The unit takes 16 lanes at a time. To take fewer it has to be told, so that it
        # is told once for the ends of all rows.
        var vectors = min(ceildiv(columns, WIDTH), VECTORS)
        var whole = part.lanes // WIDTH * WIDTH
        for is_end in range(2):
            var begin = whole if is_end == 1 else 0
            var lanes = part.lanes - whole if is_end == 1 else whole
            if lanes == 0:
                continue
            for row in range(part.rows):
                unit.multiply[True](
                    pixels,
                    vectors,
                    lanes,
                    a.unsafe_offset(row * self.row_lanes() + begin),
                    lda,
                    b.unsafe_offset((row * part.lanes + begin) * PANEL),
                    PANEL,
                    sums,
                    PANEL,
                )

    @always_inline
    def _tile(self, strip: Strip, index: Int) -> Tile:
        """A row's pixels go to as many tiles as it takes, in equal parts."""
        var tiles = self._tiles()
        var row = index // tiles
        var first = index % tiles * self.width // tiles
        var sample = row // strip.rows
        row %= strip.rows
        return Tile(
            self.buffer.unsafe_offset(
                sample * self._image_lanes(strip)
                + row * self.stride * self.row_lanes()
                + first * self.stride * self.lanes()
            ),
            ((strip.sample + sample) * self.height + strip.row + row) * self.width + first,
            (index % tiles + 1) * self.width // tiles - first,
        )


@always_inline
def _add_narrow[
    dtype: DType, vectors: Int
](pixels: Int, part: Part, a: Lanes, lda: Int, apart: Int, b: Lanes, sums: Lanes):
    """As `tile.add_segments`, of more rows and fewer columns."""
    comptime for some in range(1, NARROW_ROWS + 1):
        if pixels == some:
            _tile[dtype, some, vectors, True](
                part.lanes, a, lda, b, PANEL, sums, PANEL, part.rows, apart
            )
