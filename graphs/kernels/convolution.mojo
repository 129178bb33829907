"""Convolution of images: rows of pixels times a packed matrix.

The image is written once into rows of lanes, normed and with zeros around it. There a
pixel and those to the right of it follow one another, so that the inputs of one row of
the filter are neighbouring lanes, read where they are. A large image passes strip by
strip, so that what is written stays in the processor's caches.
"""
from std.math import ceildiv, sqrt
from std.memory.alloc import unsafe_alloc
from .lanes import Address, Lanes, Vector, WIDTH, in_lane, load_some, store_some
from .product import BLOCK, Finish, activated
from .team import Team
from .tile import PANEL, ROWS, add_segments

comptime Doubles = SIMD[DType.float64, WIDTH]
# Lanes of a strip: 8 MiB, unless it takes more for rows enough: those at its edges are
# written for two strips.
comptime STRIP = 1 << 21
comptime STRIP_ROWS = 8
# Tiles whose sums are kept while a long filter passes block by block: 192 KiB.
comptime TOGETHER = 128


@fieldwise_init
struct GroupNorm[dtype: DType](Copyable, ImplicitlyCopyable, Movable):
    """The norm of groups of channels over all pixels of a sample, (B, pixels, C)."""

    var x: Address[Self.dtype]
    var samples: Int
    var pixels: Int
    var channels: Int
    var groups: Int
    """0 where there is no norm."""
    var epsilon: Float32
    var gamma: Lanes
    var beta: Lanes
    var moments: Lanes
    """(B, blocks, 2, C): means of a block's pixels and their squared distances' sums."""
    var factors: Lanes
    """(B, 2, C): what to subtract from an element, and its factor after that."""

    @always_inline
    def together(self) -> Int:
        """Pixels of a block. It is read twice, so that it has to fit in a cache."""
        return max(16, 8192 // self.channels)

    @always_inline
    def blocks(self) -> Int:
        """Of a sample."""
        return ceildiv(self.pixels, self.together())

    @always_inline
    def moments_size(self) -> Int:
        return self.samples * self.blocks() * 2 * self.channels

    def measure(self, unit: Int):
        """Writes the moments of one block of one sample."""
        var sample = unit // self.blocks()
        var first = unit % self.blocks() * self.together()
        var count = min(self.together(), self.pixels - first)
        var x = self.x.unsafe_offset((sample * self.pixels + first) * self.channels)
        var moments = self.moments.unsafe_offset(unit * 2 * self.channels)
        var channel = 0
        while channel + 4 * WIDTH <= self.channels:
            self._measure[4](count, channel, x, moments)
            channel += 4 * WIDTH
        while channel < self.channels:
            self._measure[1](count, channel, x, moments)
            channel += WIDTH

    @always_inline
    def _measure[
        vectors: Int
    ](self, count: Int, channel: Int, x: Address[Self.dtype], moments: Lanes):
        var rest = self.channels - channel
        var means = Array[Vector, vectors](fill=Vector(0))
        for pixel in range(count):
            comptime for j in range(vectors):
                var place = pixel * self.channels + channel + j * WIDTH
                means[j] += load_some(x.unsafe_offset(place), rest - j * WIDTH)
        comptime for j in range(vectors):
            means[j] /= Vector(Float32(count))
        var squares = Array[Vector, vectors](fill=Vector(0))
        for pixel in range(count):
            comptime for j in range(vectors):
                var place = pixel * self.channels + channel + j * WIDTH
                var distance = load_some(x.unsafe_offset(place), rest - j * WIDTH) - means[j]
                squares[j] = distance.fma(distance, squares[j])
        comptime for j in range(vectors):
            var place = moments.unsafe_offset(channel + j * WIDTH)
            store_some(place, means[j], rest - j * WIDTH)
            store_some(place.unsafe_offset(self.channels), squares[j], rest - j * WIDTH)

    def combine(self, sample: Int):
        """Computes a sample's factors from the moments of its blocks."""
        var size = self.channels
        var padded = ceildiv(size, WIDTH) * WIDTH
        var means = unsafe_alloc[Scalar[DType.float64]](2 * padded, alignment=64)
        var squares = means.unsafe_offset(padded)
        var moments = self.moments.unsafe_offset(sample * self.blocks() * 2 * size)
        for channel in range(0, size, WIDTH):
            var mean = Doubles(0)
            var distances = Doubles(0)
            for block in range(self.blocks()):
                mean += Doubles(self._weight(block)) * self._moment(moments, block, 0, channel)
            for block in range(self.blocks()):
                var away = self._moment(moments, block, 0, channel) - mean
                var count = Doubles(self._weight(block) * Float64(self.pixels))
                distances += self._moment(moments, block, 1, channel) + count * away * away
            means.unsafe_offset(channel).unsafe_store(mean)
            squares.unsafe_offset(channel).unsafe_store(distances)
        var of_group = size // self.groups
        var factors = self.factors.unsafe_offset(sample * 2 * size)
        for group in range(self.groups):
            var first = group * of_group
            var mean = Float64(0)
            for channel in range(first, first + of_group):
                mean += means.unsafe_offset(channel).unsafe_load() / Float64(of_group)
            var variance = Float64(0)
            for channel in range(first, first + of_group):
                var away = means.unsafe_offset(channel).unsafe_load() - mean
                variance += away * away
                variance += squares.unsafe_offset(channel).unsafe_load() / Float64(self.pixels)
            variance /= Float64(of_group)
            var factor = Float64(1) / sqrt(variance + self.epsilon.cast[DType.float64]())
            for channel in range(first, first + of_group):
                factors.unsafe_offset(channel).unsafe_store(mean.cast[DType.float32]())
                factors.unsafe_offset(size + channel).unsafe_store(
                    factor.cast[DType.float32]() * self.gamma.unsafe_offset(channel).unsafe_load()
                )
        means.unsafe_free()

    @always_inline
    def _weight(self, block: Int) -> Float64:
        """A block's part of a sample's pixels."""
        var count = min(self.together(), self.pixels - block * self.together())
        return Float64(count) / Float64(self.pixels)

    @always_inline
    def _moment(self, moments: Lanes, block: Int, which: Int, channel: Int) -> Doubles:
        var place = (block * 2 + which) * self.channels + channel
        return load_some(
            moments.unsafe_offset(place), self.channels - channel
        ).cast[DType.float64]()


@fieldwise_init
struct Image[dtype: DType, compute: DType](Copyable, ImplicitlyCopyable, Movable):
    """An NHWC image (B, H, W, C), and how rows of it are written for a convolution."""

    var x: Address[Self.dtype]
    var height: Int
    var width: Int
    var channels: Int
    var inputs: Int
    """Channels as they are written: those of whole lanes."""
    var zoom: Int
    """How often each pixel is repeated in both directions."""
    var top: Int
    """Rows of zeros before the first."""
    var left: Int
    var padded_width: Int
    var norm: GroupNorm[Self.dtype]
    var activation: Int

    def write_row(self, sample: Int, row: Int, place: Address[Self.compute]):
        """Writes the row of that number, counted from the first row of zeros."""
        var of_x = row - self.top
        if of_x < 0 or of_x >= self.height * self.zoom:
            self._write_zeros(self.padded_width * self.inputs, place)
            return
        var x = self.x.unsafe_offset(
            (sample * self.height + of_x // self.zoom) * self.width * self.channels
        )
        var written = self.left + self.width * self.zoom
        self._write_zeros(self.left * self.inputs, place)
        self._write_zeros(
            (self.padded_width - written) * self.inputs,
            place.unsafe_offset(written * self.inputs),
        )
        var start = place.unsafe_offset(self.left * self.inputs)
        if self.norm.groups == 0 and self.zoom == 1 and self.inputs == self.channels:
            self._write_elements(self.width * self.channels, x, start)
            return
        for pixel in range(self.width):
            var from_place = x.unsafe_offset(pixel * self.channels)
            var to_place = start.unsafe_offset(pixel * self.zoom * self.inputs)
            if self.norm.groups == 0:
                self._write_elements(self.channels, from_place, to_place)
            else:
                self._write_normed(sample, from_place, to_place)
            if self.inputs > self.channels:
                to_place.unsafe_offset(self.channels).unsafe_store(Scalar[Self.compute](0))
            for again in range(1, self.zoom):
                var next = to_place.unsafe_offset(again * self.inputs)
                for k in range(0, self.inputs, WIDTH):
                    store_some(
                        next.unsafe_offset(k),
                        load_some(to_place.unsafe_offset(k), self.inputs - k),
                        self.inputs - k,
                    )

    @always_inline
    def _write_zeros(self, count: Int, place: Address[Self.compute]):
        for k in range(0, count, WIDTH):
            store_some(place.unsafe_offset(k), Vector(0), count - k)

    @always_inline
    def _write_elements(self, count: Int, x: Address[Self.dtype], place: Address[Self.compute]):
        for k in range(0, count, WIDTH):
            var value = load_some(x.unsafe_offset(k), count - k)
            store_some(place.unsafe_offset(k), activated(self.activation, value), count - k)

    @always_inline
    def _write_normed(self, sample: Int, x: Address[Self.dtype], place: Address[Self.compute]):
        """Writes one pixel."""
        var size = self.channels
        var factors = self.norm.factors.unsafe_offset(sample * 2 * size)
        for k in range(0, size, WIDTH):
            var rest = size - k
            var mean = load_some(factors.unsafe_offset(k), rest)
            var factor = load_some(factors.unsafe_offset(size + k), rest)
            var value = load_some(x.unsafe_offset(k), rest) - mean
            value = value.fma(factor, load_some(self.norm.beta.unsafe_offset(k), rest))
            store_some(place.unsafe_offset(k), activated(self.activation, value), rest)


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
struct Convolution[dtype: DType, compute: DType, result: DType](
    Copyable, ImplicitlyCopyable, Movable
):
    """A convolution with k x k filters, packed as `product.mojo` tells.

    Inputs of the matrix are filters' rows, in each its columns, in each the channels of
    `image.inputs`.
    """

    var image: Image[Self.dtype, Self.compute]
    var samples: Int
    var kernel: Int
    var stride: Int
    var height: Int
    """Of the result."""
    var width: Int
    var is_direct: Bool
    """Whether the image is rows of lanes as it is, and nothing is written."""
    var buffer: Lanes
    """A strip's rows of lanes."""
    var matrix: Lanes
    var finish: Finish[Self.result]

    @always_inline
    def lanes(self) -> Int:
        """Of a pixel."""
        return self.image.inputs // in_lane[Self.compute]()

    @always_inline
    def row_lanes(self) -> Int:
        """Of a row of the image as it is written."""
        return self.lanes() * self.image.padded_width

    @always_inline
    def rows_under(self, rows: Int) -> Int:
        """How many rows of the image that many of the result are of."""
        return (rows - 1) * self.stride + self.kernel

    @always_inline
    def rows_together(self) -> Int:
        """Rows of the result in a strip, of one sample."""
        if self.is_direct:
            return self.height
        var rows = (STRIP // self.row_lanes() - self.kernel) // self.stride + 1
        return min(max(rows, STRIP_ROWS), self.height)

    @always_inline
    def samples_together(self) -> Int:
        """Samples in a strip."""
        if self.is_direct:
            return self.samples
        if self.rows_together() < self.height:
            return 1
        var size = self.rows_under(self.height) * self.row_lanes()
        return min(max(STRIP // size, 1), self.samples)

    @always_inline
    def buffer_lanes(self) -> Int:
        """Lanes that the buffer must have."""
        var rows = self.samples_together() * self.rows_under(self.rows_together())
        return rows * self.row_lanes()

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
                team.share(me, phase, strip.samples * self.rows_under(strip.rows), 1, write)
                phase += 1
            var units = self._units_of_panel(strip) * ceildiv(self.finish.columns, PANEL)
            var grain = min(max(units // (team.size * 12), 1), TOGETHER)
            team.share(me, phase, units, grain, multiply)
            phase += 1

    def _write_rows(self, strip: Strip, begin: Int, end: Int):
        var rows = self.rows_under(strip.rows)
        for unit in range(begin, end):
            var place = self.buffer.unsafe_offset(unit * self.row_lanes())
            self.image.write_row(
                strip.sample + unit // rows,
                strip.row * self.stride + unit % rows,
                place.unsafe_bitcast[Scalar[Self.compute]](),
            )

    @always_inline
    def _tiles(self) -> Int:
        """Of a row of the result."""
        return ceildiv(self.width, ROWS)

    @always_inline
    def _units_of_panel(self, strip: Strip) -> Int:
        return strip.samples * strip.rows * self._tiles()

    def _compute_units(self, strip: Strip, begin: Int, end: Int):
        """Tiles begin to end of a strip: panel by panel, and pixel by pixel in each."""
        var of_panel = self._units_of_panel(strip)
        # Filters that fit in the second-level cache stay there while all tiles pass one
        # by one; of others, blocks of them.
        var is_short = self.kernel * self.kernel * self.lanes() <= BLOCK + BLOCK // 4
        var together = 1 if is_short else TOGETHER
        var sums = unsafe_alloc[Scalar[DType.float32]](
            min(together, end - begin) * ROWS * PANEL, alignment=64
        )
        var unit = begin
        while unit < end:
            var panel = unit // of_panel
            var first = unit % of_panel
            var count = min(min(of_panel - first, end - unit), together)
            self._compute_tiles(strip, panel, first, count, is_short, sums)
            unit += count
        sums.unsafe_free()

    def _compute_tiles(
        self, strip: Strip, panel: Int, first: Int, count: Int, is_short: Bool, sums: Lanes
    ):
        """Computes tiles of one panel of columns."""
        var lanes = self.lanes()
        var filter_row = self.kernel * lanes
        # All rows of a short filter in one go; else blocks of each row.
        var blocks = 1 if is_short else ceildiv(filter_row, BLOCK)
        var segments = self.kernel if is_short else 1
        var columns = self.finish.columns - panel * PANEL
        var b = self.matrix.unsafe_offset(panel * self.kernel * filter_row * PANEL)
        for i in range(0, count * ROWS * PANEL, WIDTH):
            sums.unsafe_offset(i).unsafe_store(Vector(0))
        for part in range(1 if is_short else self.kernel * blocks):
            var begin = part % blocks * filter_row // blocks
            var size = (part % blocks + 1) * filter_row // blocks - begin
            for i in range(count):
                var tile = self._tile(strip, first + i)
                var a = tile.a.unsafe_offset(part // blocks * self.row_lanes() + begin)
                add_segments[Self.compute](
                    tile.pixels,
                    columns,
                    segments,
                    size,
                    a,
                    self.stride * lanes,
                    self.row_lanes(),
                    b,
                    sums.unsafe_offset(i * ROWS * PANEL),
                )
            b = b.unsafe_offset(size * PANEL)
        for i in range(count):
            var tile = self._tile(strip, first + i)
            self.finish.write(
                tile.pixels, tile.pixel, panel * PANEL, sums.unsafe_offset(i * ROWS * PANEL)
            )

    @always_inline
    def _tile(self, strip: Strip, index: Int) -> Tile:
        """A row's pixels go to as many tiles as it takes, in equal parts."""
        var tiles = self._tiles()
        var row = index // tiles
        var first = index % tiles * self.width // tiles
        var sample = row // strip.rows
        row %= strip.rows
        var rows_of_sample = self.image.height if self.is_direct else self.rows_under(strip.rows)
        var image_row = sample * rows_of_sample + row * self.stride
        return Tile(
            self.buffer.unsafe_offset(
                image_row * self.row_lanes() + first * self.stride * self.lanes()
            ),
            ((strip.sample + sample) * self.height + strip.row + row) * self.width + first,
            (index % tiles + 1) * self.width // tiles - first,
        )
