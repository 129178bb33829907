"""Attention over rows as a linear layer writes them: a token's query, key and value
anywhere in its row, heads side by side.

Keys of a head are normed, rotated and laid out for products once; queries go through in
blocks, with a running maximum, so that no matrix of all scores exists.
"""
from std.math import ceildiv, sqrt
from std.memory.alloc import unsafe_alloc
from .lanes import (
    Address,
    Lanes,
    Vector,
    WIDTH,
    bfloat16_bits,
    exponential,
    in_lane,
    is_below,
    load_some,
    store,
    store_some,
)
from .matrix_unit import MATRIX_ROWS, MatrixUnit
from .rows import LAYER_NORM, NO_NORM
from .team import Team
from .tile import PANEL, ROWS, VECTORS, multiply_tile

comptime QUERIES = 48
"""Of a block, whose scores stay in the first-level cache."""
comptime KEYS = 256
"""Of a block."""
# What the highest score is at least: below it no query has a key that counts.
comptime LOWEST = Float32(-3.0e38)


@fieldwise_init
struct Stream[dtype: DType](Copyable, ImplicitlyCopyable, Movable):
    """Tokens that attend together, and where their output goes."""

    var tokens: Address[Self.dtype]
    """(B, length, stride)."""
    var length: Int
    var stride: Int
    var query: Int
    """Column of the first head's query."""
    var key: Int
    var value: Int
    var norm: Lanes
    """Factors of queries and of keys, then what is added to each: (4, size)."""
    var rotary: Lanes
    """Cosines, then sines: (2, length, size)."""
    var rotary_stride: Int
    """Elements from one sample's table to the next one's; 0 where all share one."""
    var y: Address[Self.dtype]
    """(B, length, heads * size)."""

    @always_inline
    def row(self, sample: Int, token: Int) -> Address[Self.dtype]:
        return self.tokens.unsafe_offset((sample * self.length + token) * self.stride)


@fieldwise_init
struct Heads[dtype: DType, compute: DType, size: Int](Copyable, ImplicitlyCopyable, Movable):
    """Attention of one or two streams, the second one after the first.

    Parameters:
        dtype: Of tokens and output.
        compute: Of the products.
        size: Of a head.
    """

    var samples: Int
    var count: Int
    """Of the heads."""
    var first: Stream[Self.dtype]
    var second: Stream[Self.dtype]
    var norm: Int
    var epsilon: Float32
    var is_rotated: Bool
    var scale: Float32
    var has_bias: Bool
    var bias: Lanes
    """Added to scores; columns are keys."""
    var sample_stride: Int
    var head_stride: Int
    var query_stride: Int
    var has_unit: Bool
    """Whether a matrix unit multiplies; only bfloat16."""

    comptime groups = ceildiv(Self.size, WIDTH)
    comptime padded = Self.groups * WIDTH
    comptime pair = in_lane[Self.compute]()
    comptime lanes = Self.padded // Self.pair
    """Of a query or a key."""

    @always_inline
    def length(self) -> Int:
        return self.first.length + self.second.length

    @always_inline
    def room(self) -> Int:
        """Lanes for the keys, or the values, of one head."""
        return ceildiv(self.length(), PANEL) * PANEL * Self.padded // Self.pair

    @always_inline
    def _place(self, token: Int) -> Tuple[Stream[Self.dtype], Int]:
        if token < self.first.length:
            return self.first, token
        return self.second, token - self.first.length

    @always_inline
    def _normed(
        self, at: Stream[Self.dtype], sample: Int, token: Int, x: Address[Self.dtype],
        which: Int, factor: Float32, y: Lanes,
    ):
        """A head's query (which = 0) or key (1) to float32, zero up to `padded`."""
        var values = Array[Vector, Self.groups](fill=Vector(0))
        var mean = Vector(0)
        comptime for j in range(Self.groups):
            values[j] = load_some(x.unsafe_offset(j * WIDTH), Self.size - j * WIDTH)
        if self.norm != NO_NORM:
            if self.norm == LAYER_NORM:
                var sum = Vector(0)
                comptime for j in range(Self.groups):
                    sum += values[j]
                mean = Vector(sum.reduce_add() / Float32(Self.size))
            var squares = Vector(0)
            comptime for j in range(Self.groups):
                values[j] -= mean
                comptime if Self.size - j * WIDTH < WIDTH:
                    values[j] = is_below(Self.size - j * WIDTH).select(values[j], Vector(0))
                squares = values[j].fma(values[j], squares)
            var root = Vector(
                Float32(1) / sqrt(squares.reduce_add() / Float32(Self.size) + self.epsilon)
            )
            var weight = at.norm.unsafe_offset(which * Self.size)
            comptime for j in range(Self.groups):
                comptime rest = Self.size - j * WIDTH
                values[j] *= root * load_some(weight.unsafe_offset(j * WIDTH), rest)
                if self.norm == LAYER_NORM:
                    values[j] += load_some(
                        weight.unsafe_offset(2 * Self.size + j * WIDTH), rest
                    )
        if self.is_rotated:
            var table = at.rotary.unsafe_offset(sample * at.rotary_stride)
            var cosines = table.unsafe_offset(token * Self.size)
            var sines = cosines.unsafe_offset(at.length * Self.size)
            comptime for j in range(Self.groups):
                comptime rest = Self.size - j * WIDTH
                # (a, b) to (-b, a), for every pair of neighbours
                var turned = values[j].shuffle[
                    1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
                ]() * Vector(-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1)
                values[j] = turned.fma(
                    load_some(sines.unsafe_offset(j * WIDTH), rest),
                    values[j] * load_some(cosines.unsafe_offset(j * WIDTH), rest),
                )
        comptime for j in range(Self.groups):
            y.unsafe_offset(j * WIDTH).unsafe_store(values[j] * Vector(factor))

    def prepare(
        self, sample: Int, head: Int, begin: Int, end: Int, keys: Lanes, values: Lanes
    ):
        """Lays out keys and values of a head, of whole panels; zeros after the last.

        Keys are (panels, lanes of a head, 64 tokens), values (vectors of up to 64 of
        the head, lanes of tokens, that many).
        """
        var length = self.length()
        var padded_length = ceildiv(length, PANEL) * PANEL
        var row = unsafe_alloc[Scalar[DType.float32]](Self.padded, alignment=64)
        var key = unsafe_alloc[Scalar[DType.float32]](Self.lanes, alignment=64)
        for token in range(begin, end):
            comptime for j in range(Self.groups):
                row.unsafe_offset(j * WIDTH).unsafe_store(Vector(0))
            var is_inside = token < length
            var at, own = self._place(token if is_inside else 0)
            var x = at.row(sample, own)
            if is_inside:
                var start = x.unsafe_offset(at.key + head * Self.size)
                self._normed(at, sample, own, start, 1, Float32(1), row)
            var key_elements = key.unsafe_bitcast[Scalar[Self.compute]]()
            comptime for j in range(Self.groups):
                store(
                    key_elements.unsafe_offset(j * WIDTH),
                    row.unsafe_offset(j * WIDTH).unsafe_load[width=WIDTH](),
                )
            var column = keys.unsafe_offset(token // PANEL * Self.lanes * PANEL + token % PANEL)
            for lane in range(Self.lanes):
                column.unsafe_offset(lane * PANEL).unsafe_store(
                    key.unsafe_offset(lane).unsafe_load()
                )
            var value = x.unsafe_offset(at.value + head * Self.size)
            comptime for start in range(0, Self.groups, VECTORS):
                comptime vectors = min(VECTORS, Self.groups - start)
                var line = values.unsafe_offset(
                    start * WIDTH * padded_length // Self.pair
                    + token // Self.pair * vectors * WIDTH
                )
                comptime for j in range(vectors):
                    var elements = Vector(0)
                    if is_inside:
                        comptime first = (start + j) * WIDTH
                        elements = load_some(value.unsafe_offset(first), Self.size - first)
                    var place = line.unsafe_offset(j * WIDTH)
                    comptime if Self.pair == 1:
                        place.unsafe_store(elements)
                    else:
                        _store_half(place, elements, token % Self.pair)
        key.unsafe_free()
        row.unsafe_free()

    def attend(
        self, sample: Int, head: Int, begin: Int, end: Int, keys: Lanes, values: Lanes
    ):
        """Queries begin to end of one head of one sample."""
        var length = self.length()
        var padded_length = ceildiv(length, PANEL) * PANEL
        var row = unsafe_alloc[Scalar[DType.float32]](Self.padded, alignment=64)
        var queries = unsafe_alloc[Scalar[DType.float32]](QUERIES * Self.lanes, alignment=64)
        var scores = unsafe_alloc[Scalar[DType.float32]](QUERIES * KEYS, alignment=64)
        var shares = unsafe_alloc[Scalar[DType.float32]](
            QUERIES * KEYS // Self.pair, alignment=64
        )
        var mixed = unsafe_alloc[Scalar[DType.float32]](QUERIES * Self.padded, alignment=64)
        var highest = unsafe_alloc[Scalar[DType.float32]](QUERIES, alignment=64)
        var totals = unsafe_alloc[Scalar[DType.float32]](QUERIES, alignment=64)
        var unit = MatrixUnit.begin()
        var start = begin
        while start < end:
            var count = min(MATRIX_ROWS if self.has_unit else QUERIES, end - start)
            for i in range(count):
                var at, own = self._place(start + i)
                self._normed(
                    at,
                    sample,
                    own,
                    at.row(sample, own).unsafe_offset(at.query + head * Self.size),
                    0,
                    self.scale,
                    row,
                )
                var place = queries.unsafe_offset(i * Self.lanes).unsafe_bitcast[
                    Scalar[Self.compute]
                ]()
                comptime for j in range(Self.groups):
                    store(
                        place.unsafe_offset(j * WIDTH),
                        row.unsafe_offset(j * WIDTH).unsafe_load[width=WIDTH](),
                    )
            for first_key in range(0, length, KEYS):
                var valid = min(KEYS, length - first_key)
                # Panels outermost: each stays near while all queries pass.
                for panel in range(ceildiv(valid, PANEL)):
                    var place = keys.unsafe_offset(
                        (first_key // PANEL + panel) * Self.lanes * PANEL
                    )
                    self._multiply[VECTORS, False](
                        unit,
                        count,
                        Self.lanes,
                        queries,
                        Self.lanes,
                        place,
                        PANEL,
                        scores.unsafe_offset(panel * PANEL),
                        KEYS,
                    )
                for i in range(count):
                    if self.has_bias:
                        self._add_bias(
                            sample, head, start + i, first_key, valid,
                            scores.unsafe_offset(i * KEYS),
                        )
                    self._weigh(
                        first_key == 0,
                        valid,
                        scores.unsafe_offset(i * KEYS),
                        shares.unsafe_offset(i * KEYS // Self.pair),
                        mixed.unsafe_offset(i * Self.padded),
                        highest.unsafe_offset(i),
                        totals.unsafe_offset(i),
                    )
                var lanes = ceildiv(valid, Self.pair)
                if self.has_unit:
                    lanes = ceildiv(lanes, WIDTH) * WIDTH  # the rest are zeros
                comptime for group in range(0, Self.groups, VECTORS):
                    comptime vectors = min(VECTORS, Self.groups - group)
                    comptime width = vectors * WIDTH
                    var place = values.unsafe_offset(
                        group * WIDTH * padded_length // Self.pair
                        + first_key // Self.pair * width
                    )
                    var sums = mixed.unsafe_offset(group * WIDTH)
                    if first_key == 0:
                        self._multiply[vectors, False](
                            unit, count, lanes, shares, KEYS // Self.pair, place, width, sums,
                            Self.padded,
                        )
                    else:
                        self._multiply[vectors, True](
                            unit, count, lanes, shares, KEYS // Self.pair, place, width, sums,
                            Self.padded,
                        )
            for i in range(count):
                var at, own = self._place(start + i)
                var y = at.y.unsafe_offset(
                    ((sample * at.length + own) * self.count + head) * Self.size
                )
                var factor = Vector(Float32(1) / totals.unsafe_offset(i).unsafe_load())
                comptime for j in range(Self.groups):
                    store_some(
                        y.unsafe_offset(j * WIDTH),
                        mixed.unsafe_offset(i * Self.padded + j * WIDTH).unsafe_load[
                            width=WIDTH
                        ]() * factor,
                        Self.size - j * WIDTH,
                    )
            start += count
        row.unsafe_free()
        queries.unsafe_free()
        scores.unsafe_free()
        shares.unsafe_free()
        mixed.unsafe_free()
        highest.unsafe_free()
        totals.unsafe_free()
        unit.end()

    @always_inline
    def _multiply[
        vectors: Int, is_added: Bool
    ](
        self, unit: MatrixUnit, count: Int, lanes: Int, a: Lanes, lda: Int, b: Lanes, ldb: Int,
        c: Lanes, ldc: Int,
    ):
        """Computes c = a b, or c += a b, of `count` rows."""
        comptime if Self.compute == DType.bfloat16:
            if self.has_unit:
                for i in range(0, count, MATRIX_ROWS):
                    unit.multiply[is_added](
                        min(MATRIX_ROWS, count - i), vectors, lanes,
                        a.unsafe_offset(i * lda), lda, b, ldb, c.unsafe_offset(i * ldc), ldc,
                    )
                return
        for i in range(0, count, ROWS):
            multiply_tile[Self.compute, vectors, is_added](
                min(ROWS, count - i), lanes,
                a.unsafe_offset(i * lda), lda, b, ldb, c.unsafe_offset(i * ldc), ldc,
            )

    @always_inline
    def _add_bias(
        self, sample: Int, head: Int, query: Int, first_key: Int, valid: Int, scores: Lanes
    ):
        var bias = self.bias.unsafe_offset(
            sample * self.sample_stride
            + head * self.head_stride
            + query * self.query_stride
            + first_key
        )
        for j in range(0, valid, WIDTH):
            var place = scores.unsafe_offset(j)
            place.unsafe_store(
                place.unsafe_load[width=WIDTH]() + load_some(bias.unsafe_offset(j), valid - j)
            )

    @always_inline
    def _weigh(
        self, is_first: Bool, valid: Int, scores: Lanes, shares: Lanes, mixed: Lanes,
        highest: Lanes, total: Lanes,
    ):
        """Scores of one query to shares of the values; what was mixed so far shrinks
        where a higher score has come."""
        var whole = valid // WIDTH
        var rest = valid - whole * WIDTH
        var is_inside = is_below(rest)
        var tops = Vector(LOWEST)
        for j in range(whole):
            tops = max(tops, scores.unsafe_offset(j * WIDTH).unsafe_load[width=WIDTH]())
        if rest > 0:
            var last = scores.unsafe_offset(whole * WIDTH).unsafe_load[width=WIDTH]()
            tops = max(tops, is_inside.select(last, Vector(LOWEST)))
        var top = tops.reduce_max()
        var sum = Float32(0)
        if not is_first:
            var before = highest.unsafe_load()
            sum = total.unsafe_load()
            top = max(top, before)
            if top > before:
                var factor = exponential(Vector(before - top))
                sum *= factor[0]
                comptime for j in range(Self.groups):
                    var place = mixed.unsafe_offset(j * WIDTH)
                    place.unsafe_store(place.unsafe_load[width=WIDTH]() * factor)
        highest.unsafe_store(top)
        var sums = Vector(0)
        var place = shares.unsafe_bitcast[Scalar[Self.compute]]()
        for j in range(whole):
            var share = exponential(
                scores.unsafe_offset(j * WIDTH).unsafe_load[width=WIDTH]() - Vector(top)
            )
            sums += share
            store(place.unsafe_offset(j * WIDTH), share)
        if rest > 0:
            var share = exponential(
                scores.unsafe_offset(whole * WIDTH).unsafe_load[width=WIDTH]() - Vector(top)
            )
            share = is_inside.select(share, Vector(0))
            sums += share
            store(place.unsafe_offset(whole * WIDTH), share)
        comptime if Self.compute == DType.bfloat16:
            var stored = ceildiv(valid, WIDTH)
            if stored % 2 == 1:
                store(place.unsafe_offset(stored * WIDTH), Vector(0))
        total.unsafe_store(sum + sums.reduce_add())

    @always_inline
    def parts(self, threads: Int) -> Int:
        """Of how many tasks a head is, as few heads do not divide among many threads."""
        var heads = self.samples * self.count
        var parts = 1
        while (
            heads * parts % threads != 0
            and heads * parts < 4 * threads
            and self.length() // (parts + 1) >= 2 * QUERIES
        ):
            parts += 1
        return parts

    @always_inline
    def shared_lanes(self, parts: Int) -> Int:
        """Lanes for the keys and the values of all heads, where tasks share them."""
        return 2 * self.samples * self.count * self.room() if parts > 1 else 0

    @always_inline
    def share(self, team: Team, me: Int, parts: Int, shared: Lanes):
        """Computes all of it, as two phases of a team's work.

        A task is a head of a sample, or a part of its queries: then all heads' keys and
        values are laid out first, panel by panel, in `shared`.
        """
        var heads = self.samples * self.count
        var room = self.room()
        if parts > 1:
            var panels = ceildiv(self.length(), PANEL)

            def lay_out(begin: Int, end: Int) {imm}:
                for unit in range(begin, end):
                    var head = unit // panels
                    var token = unit % panels * PANEL
                    var keys = shared.unsafe_offset(2 * head * room)
                    self.prepare(
                        head // self.count,
                        head % self.count,
                        token,
                        token + PANEL,
                        keys,
                        keys.unsafe_offset(room),
                    )

            team.share(me, 0, heads * panels, 1, lay_out)

        def work(begin: Int, end: Int) {imm}:
            if parts == 1:
                self._work_alone(begin, end)
                return
            var length = self.length()
            for task in range(begin, end):
                var head = task // parts
                var part = task % parts
                var keys = shared.unsafe_offset(2 * head * room)
                self.attend(
                    head // self.count,
                    head % self.count,
                    part * length // parts,
                    (part + 1) * length // parts,
                    keys,
                    keys.unsafe_offset(room),
                )

        team.share(me, 1, heads * parts, 1, work)

    def _work_alone(self, begin: Int, end: Int):
        """Whole heads begin to end, whose keys nobody else needs."""
        var length = self.length()
        var keys = unsafe_alloc[Scalar[DType.float32]](2 * self.room(), alignment=64)
        var values = keys.unsafe_offset(self.room())
        for head in range(begin, end):
            var sample = head // self.count
            var own = head % self.count
            self.prepare(sample, own, 0, ceildiv(length, PANEL) * PANEL, keys, values)
            self.attend(sample, own, 0, length, keys, values)
        keys.unsafe_free()


@always_inline
def _store_half(lanes: Lanes, elements: Vector, which: Int):
    """Puts bfloat16 into one half of lanes, the first half first: it empties the other."""
    var bits = bfloat16_bits(elements).cast[DType.uint32]()
    var place = lanes.unsafe_bitcast[UInt32]()
    if which == 1:
        bits = place.unsafe_load[width=WIDTH]() | bits << 16
    place.unsafe_store(bits)
