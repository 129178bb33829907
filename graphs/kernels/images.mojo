"""Images as a convolution reads them: rows of lanes, normed and with zeros around.

Frames of a video may be normed together, and scaled and shifted by a coarser video; a
convolution over time then sees frames of the part before, too.
"""
from std.math import ceildiv, sqrt
from std.memory.alloc import unsafe_alloc
from .lanes import Address, Lanes, Vector, WIDTH, load_some, store_some
from .product import activated

comptime Doubles = SIMD[DType.float64, WIDTH]
comptime Indices = Address[DType.int64]


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
struct Modulation(Copyable, ImplicitlyCopyable, Movable):
    """What scales and shifts normed pixels: `normed * scale + shift`."""

    var start: Lanes
    """(frames, height, width, columns)."""
    var height: Int
    var width: Int
    var columns: Int
    var scale: Int
    """The first column of scales."""
    var shift: Int
    var zoom: Int
    """How many pixels one of its own is for, in both directions; 0 without any."""

    @always_inline
    def of_row(self, frame: Int, row: Int) -> Lanes:
        """Its row for a row of pixels."""
        return self.start.unsafe_offset(
            (frame * self.height + row // self.zoom) * self.width * self.columns
        )


@fieldwise_init
struct Frames[dtype: DType](Copyable, ImplicitlyCopyable, Movable):
    """Which frames a filter over time sees, by their index in the two before, which are
    as they were left, and x behind them. Of images, each is its own only frame."""

    var filters: Int
    """Frames of a filter; 1 of images."""
    var count: Int
    """Of x."""
    var before: Address[Self.dtype]
    """As many as a filter has beside its last."""
    var first: Indices
    """Of the first frame under each result's filter."""
    var last: Indices
    """Of the frames after those: what the filter of the last result sees besides."""
    var kept: Address[Self.dtype]
    """Where those frames are left for what follows."""

    @always_inline
    def under(self, samples: Int) -> Int:
        """Frames that so many results see."""
        return samples + self.filters - 1

    @always_inline
    def index(self, place: Int) -> Int:
        """Of a frame, by its place among all that are seen."""
        if place < self.count:
            return Int(self.first.unsafe_offset(place).unsafe_load())
        return Int(self.last.unsafe_offset(place - self.count).unsafe_load())


@fieldwise_init
struct Image[dtype: DType, compute: DType](Copyable, ImplicitlyCopyable, Movable):
    """NHWC images (B, H, W, C), and how rows of them are written for a convolution."""

    var x: Address[Self.dtype]
    var height: Int
    var width: Int
    var channels: Int
    var inputs: Int
    """Channels as they are written: those of whole lanes."""
    var zoom: Int
    """How often each pixel is repeated in both directions; 1 of frames."""
    var top: Int
    """Rows of zeros before the first."""
    var left: Int
    var padded_width: Int
    var norm: GroupNorm[Self.dtype]
    var modulation: Modulation
    var activation: Int
    var frames: Frames[Self.dtype]

    def write_row(self, place: Int, row: Int, to: Address[Self.compute]):
        """Writes a row of the image at that place among all that are seen, counted from
        the first row of zeros."""
        var of_x = row - self.top
        if of_x < 0 or of_x >= self.height * self.zoom:
            self._write_zeros(self.padded_width * self.inputs, to)
            return
        var written = self.left + self.width * self.zoom
        self._write_zeros(self.left * self.inputs, to)
        self._write_zeros(
            (self.padded_width - written) * self.inputs,
            to.unsafe_offset(written * self.inputs),
        )
        var start = to.unsafe_offset(self.left * self.inputs)
        var size = self.width * self.channels
        if self.frames.filters == 1:
            var own = (place * self.height + of_x // self.zoom) * size
            self._write_pixels(place, 0, of_x, self.x.unsafe_offset(own), start)
            return
        var before = self.frames.filters - 1
        var index = self.frames.index(place)
        if index < before:
            var own = (index * self.height + of_x) * size
            self._write_plain[False](self.frames.before.unsafe_offset(own), start)
        else:
            var frame = index - before
            var own = (frame * self.height + of_x) * size
            self._write_pixels(0, frame, of_x, self.x.unsafe_offset(own), start)
        if place >= self.frames.count:
            var kept = ((place - self.frames.count) * self.height + of_x) * size
            self._keep(start, self.frames.kept.unsafe_offset(kept))

    @always_inline
    def _write_pixels(
        self,
        sample: Int,
        frame: Int,
        row: Int,
        x: Address[Self.dtype],
        start: Address[Self.compute],
    ):
        """Pixels of a row that is normed as `sample`, and scaled as that frame."""
        if self.norm.groups == 0:
            self._write_plain[True](x, start)
            return
        var given = self.modulation.start
        var zoom = self.modulation.zoom
        if zoom > 0:
            given = self.modulation.of_row(frame, row)
        for pixel in range(self.width):
            var to = start.unsafe_offset(pixel * self.zoom * self.inputs)
            var own = given
            if zoom > 0:
                own = given.unsafe_offset(pixel // zoom * self.modulation.columns)
            self._write_normed(sample, x.unsafe_offset(pixel * self.channels), own, to)
            self._repeat(to)

    @always_inline
    def _write_plain[is_activated: Bool](
        self, x: Address[Self.dtype], start: Address[Self.compute]
    ):
        """Pixels of a row without a norm."""
        var activation = self.activation if is_activated else 0
        if self.zoom == 1 and self.inputs == self.channels:
            self._write_elements(self.width * self.channels, activation, x, start)
            return
        for pixel in range(self.width):
            var to = start.unsafe_offset(pixel * self.zoom * self.inputs)
            var own = x.unsafe_offset(pixel * self.channels)
            self._write_elements(self.channels, activation, own, to)
            self._repeat(to)

    @always_inline
    def _repeat(self, to: Address[Self.compute]):
        """Completes a pixel that is written, and repeats it."""
        if self.inputs > self.channels:
            to.unsafe_offset(self.channels).unsafe_store(Scalar[Self.compute](0))
        for again in range(1, self.zoom):
            var next = to.unsafe_offset(again * self.inputs)
            for k in range(0, self.inputs, WIDTH):
                store_some(
                    next.unsafe_offset(k),
                    load_some(to.unsafe_offset(k), self.inputs - k),
                    self.inputs - k,
                )

    def _keep(self, start: Address[Self.compute], to: Address[Self.dtype]):
        """Copies a row of pixels as they are written."""
        for pixel in range(self.width):
            var own = start.unsafe_offset(pixel * self.inputs)
            var kept = to.unsafe_offset(pixel * self.channels)
            for k in range(0, self.channels, WIDTH):
                var rest = self.channels - k
                store_some(kept.unsafe_offset(k), load_some(own.unsafe_offset(k), rest), rest)

    @always_inline
    def _write_zeros(self, count: Int, to: Address[Self.compute]):
        for k in range(0, count, WIDTH):
            store_some(to.unsafe_offset(k), Vector(0), count - k)

    @always_inline
    def _write_elements(
        self, count: Int, activation: Int, x: Address[Self.dtype], to: Address[Self.compute]
    ):
        for k in range(0, count, WIDTH):
            var value = load_some(x.unsafe_offset(k), count - k)
            store_some(to.unsafe_offset(k), activated(activation, value), count - k)

    @always_inline
    def _write_normed(
        self, sample: Int, x: Address[Self.dtype], given: Lanes, to: Address[Self.compute]
    ):
        """Writes one pixel."""
        var size = self.channels
        var factors = self.norm.factors.unsafe_offset(sample * 2 * size)
        var scales = given.unsafe_offset(self.modulation.scale)
        var shifts = given.unsafe_offset(self.modulation.shift)
        for k in range(0, size, WIDTH):
            var rest = size - k
            var mean = load_some(factors.unsafe_offset(k), rest)
            var factor = load_some(factors.unsafe_offset(size + k), rest)
            var value = load_some(x.unsafe_offset(k), rest) - mean
            value = value.fma(factor, load_some(self.norm.beta.unsafe_offset(k), rest))
            if self.modulation.zoom > 0:
                var scale = load_some(scales.unsafe_offset(k), rest)
                value = value.fma(scale, load_some(shifts.unsafe_offset(k), rest))
            store_some(to.unsafe_offset(k), activated(self.activation, value), rest)
