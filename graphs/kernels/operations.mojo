"""What graphs call. Sizes that do not fit are errors: nothing is read out of bounds.

Sizes are numbers here, not parameters as MAX knows them: one kernel serves all layers
of a graph that have the same dtypes, instead of each being compiled by itself.
"""
import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.memory.alloc import unsafe_alloc
from .heads import Heads, Stream
from .lanes import Address, Lanes, in_lane, lane_count, multiplies_bfloat16
from .matrix_unit import may_use_matrix_unit
from .product import Finish, Product, Rows
from .rows import LAYER_NORM, NO_NORM, Norm, copy_row
from .team import Team, run_team, team_size
from .tile import PANEL, ROWS

# Multiplications below which one thread is quicker than several.
comptime ALONE = 1 << 20
# The same where a matrix unit multiplies.
comptime UNIT_ALONE = 1 << 24


@fieldwise_init
struct Matrix[dtype: DType](Copyable, ImplicitlyCopyable, Movable):
    """A tensor of one or two axes."""

    var start: Address[Self.dtype]
    var rows: Int
    var columns: Int


@fieldwise_init
struct Block[dtype: DType](Copyable, ImplicitlyCopyable, Movable):
    """A tensor of three axes."""

    var start: Address[Self.dtype]
    var first: Int
    var second: Int
    var third: Int


@always_inline
def _vector[
    dtype: DType
](tensor: InputTensor[dtype=dtype, rank=1, ...]) -> Matrix[dtype]:
    var start = tensor.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    return Matrix[dtype](start, 1, tensor.dim_size(0))


@always_inline
def _matrix[
    dtype: DType
](tensor: InputTensor[dtype=dtype, rank=2, ...]) -> Matrix[dtype]:
    var start = tensor.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    return Matrix[dtype](start, tensor.dim_size(0), tensor.dim_size(1))


@always_inline
def _block[
    dtype: DType
](tensor: InputTensor[dtype=dtype, rank=3, ...]) -> Block[dtype]:
    var start = tensor.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    return Block[dtype](start, tensor.dim_size(0), tensor.dim_size(1), tensor.dim_size(2))


@always_inline
def _result[
    dtype: DType
](tensor: OutputTensor[dtype=dtype, rank=3, ...]) -> Block[dtype]:
    var start = tensor.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    return Block[dtype](start, tensor.dim_size(0), tensor.dim_size(1), tensor.dim_size(2))


@fieldwise_init
struct Settings(Copyable, ImplicitlyCopyable, Movable):
    """Numbers that a graph gives an operation, as 32-bit integers."""

    var start: Address[DType.int32]

    @always_inline
    def __getitem__(self, index: Int) -> Int:
        return Int(self.start.unsafe_offset(index).unsafe_load())

    @always_inline
    def number(self, index: Int) -> Float32:
        """A float32 by its bits."""
        return self.start.unsafe_offset(index).unsafe_bitcast[Float32]().unsafe_load()


def _settings(
    tensor: InputTensor[dtype=DType.int32, rank=1, ...], count: Int
) raises -> Settings:
    _check(tensor.dim_size(0) == count, "an operation has other settings")
    return Settings(_vector(tensor).start)


def _check(is_so: Bool, what: StaticString) raises:
    if not is_so:
        raise Error(what)


@extensibility.register("diffusion_linear")
struct Linear:
    """Computes finish(norm(x) and `beside`, times a packed matrix), see `product.mojo`.

    `settings`: 0 and 1 first column of x and how many, 2 and 3 of beside; 4 column of
    the matrix that is y's first; 5 activation, 6 column of y that it begins at; 7 norm,
    8 its epsilon and 9 its offset by their bits; 10 and 11 column of `vectors` that
    scale and shift begin at, -1 of no shift; 12 that of the gate, -1 of none.
    """

    @staticmethod
    def execute[
        target: StaticString,
    ](
        y: OutputTensor[rank=2, ...],
        x: InputTensor[rank=2, ...],
        beside: InputTensor[rank=2, ...],
        matrix: InputTensor[rank=3, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        vectors: InputTensor[dtype=DType.float32, rank=2, ...],
        residual: InputTensor[rank=2, ...],
        settings: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime assert residual.dtype == y.dtype, "linear: the residual's dtype is another"
        var added = _matrix(residual)
        _linear[matrix.dtype, x.dtype, beside.dtype, y.dtype](
            Matrix[y.dtype](
                y.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
                y.dim_size(0),
                y.dim_size(1),
            ),
            _matrix(x),
            _matrix(beside),
            _block(matrix),
            _vector(bias),
            _matrix(vectors),
            Matrix[y.dtype](
                added.start.unsafe_bitcast[Scalar[y.dtype]](), added.rows, added.columns
            ),
            _settings(settings, 13),
        )


@no_inline
def _linear[
    compute: DType, source: DType, other: DType, result: DType
](
    y: Matrix[result],
    x: Matrix[source],
    beside: Matrix[other],
    matrix: Block[compute],
    bias: Matrix[DType.float32],
    vectors: Matrix[DType.float32],
    residual: Matrix[result],
    how: Settings,
) raises:
    comptime pair = in_lane[compute]()
    var size = how[1]
    var beside_size = how[3]
    var norm_kind = how[7]
    var is_gated = how[12] >= 0
    var lanes = lane_count[compute](size + beside_size)
    var has_bias = bias.columns > 0
    _check(min(min(how[0], how[2]), how[4]) >= 0, "linear: a column is negative")
    _check(how[0] + size <= x.columns, "linear: x has fewer columns")
    _check(y.rows == x.rows, "linear: y has other rows than x")
    if beside_size > 0:
        _check(beside.rows == x.rows, "linear: rows beside are not those of x")
        _check(how[2] + beside_size <= beside.columns, "linear: beside has fewer columns")
    _check(matrix.second == lanes, "linear: the matrix has other inputs")
    _check(matrix.third == PANEL * pair, "linear: the matrix is not packed")
    _check(how[4] + y.columns <= matrix.first * PANEL, "linear: the matrix has fewer columns")
    _check(not has_bias or how[4] + y.columns <= bias.columns, "linear: bias is shorter")
    if norm_kind != NO_NORM or is_gated:
        _check(
            vectors.rows > 0 and x.rows % max(vectors.rows, 1) == 0,
            "linear: rows are no multiple of those of vectors",
        )
        _check(
            norm_kind == NO_NORM or max(how[10], how[11]) + size <= vectors.columns,
            "linear: vectors are shorter than rows",
        )
        _check(not is_gated or how[12] + y.columns <= vectors.columns, "linear: the gate is shorter")
    if is_gated:
        _check(
            residual.rows == y.rows and residual.columns == y.columns,
            "linear: the residual is not like y",
        )
    var rows_of_vector = max(x.rows // max(vectors.rows, 1), 1)
    var x_start = x.start.unsafe_offset(how[0])
    var beside_start = beside.start.unsafe_offset(how[2])
    var finish = Finish[result](
        y.start,
        how[4],
        y.columns,
        has_bias,
        bias.start,
        how[5],
        how[6],
        is_gated,
        vectors.start.unsafe_offset(max(how[12], 0)),
        vectors.columns,
        rows_of_vector,
        residual.start,
    )
    # Rows that are lanes already are read where they are.
    comptime is_same = source == compute and other == compute
    var has_unit = False
    comptime if compute == DType.bfloat16:
        has_unit = may_use_matrix_unit()
    var alone = UNIT_ALONE if has_unit else ALONE
    # Fewer rows than a tile has take as long.
    var is_parallel = max(x.rows, ROWS) * lanes * pair * y.columns > alone
    var is_aligned = (how[0] | x.columns | size) % pair == 0 and (
        beside_size == 0 or (how[2] | beside.columns | beside_size) % pair == 0
    )
    if is_same and norm_kind == NO_NORM and is_aligned:
        var product = Product[compute, result](
            x.rows,
            Rows(x_start.unsafe_bitcast[Float32](), x.columns // pair, size // pair),
            Rows(
                beside_start.unsafe_bitcast[Float32](),
                beside.columns // pair,
                beside_size // pair,
            ),
            matrix.start.unsafe_bitcast[Float32](),
            finish,
            has_unit,
        )

        def direct(team: Team, me: Int) {imm}:
            product.share(team, me, 0)

        run_team(1, is_parallel, direct)
        return
    var buffer = unsafe_alloc[Scalar[DType.float32]](max(x.rows * lanes, 1), alignment=64)
    var norm = Norm(
        norm_kind,
        how.number(8),
        how.number(9),
        vectors.start.unsafe_offset(max(how[10], 0)),
        how[11] >= 0,
        vectors.start.unsafe_offset(max(how[11], 0)),
    )
    var product = Product[compute, result](
        x.rows,
        Rows(buffer, lanes, lanes),
        Rows(buffer, 0, 0),
        matrix.start.unsafe_bitcast[Float32](),
        finish,
        has_unit,
    )

    def gathered(team: Team, me: Int) {imm}:
        def rows(begin: Int, end: Int) {imm}:
            for row in range(begin, end):
                var place = buffer.unsafe_offset(row * lanes).unsafe_bitcast[Scalar[compute]]()
                var line = x_start.unsafe_offset(row * x.columns)
                if norm_kind == NO_NORM:
                    copy_row[source, compute](size, line, place)
                else:
                    norm.moved(row // rows_of_vector * vectors.columns).write[source, compute](
                        size, line, place
                    )
                copy_row[other, compute](
                    beside_size,
                    beside_start.unsafe_offset(row * beside.columns),
                    place.unsafe_offset(size),
                )
                for k in range(size + beside_size, lanes * pair):
                    place.unsafe_offset(k).unsafe_store(Scalar[compute](0))

        team.share(me, 0, x.rows, 4, rows)
        product.share(team, me, 1)

    run_team(2, is_parallel, gathered)
    buffer.unsafe_free()


@extensibility.register("diffusion_attention")
struct Attention[size: Int]:
    """Attention of (B, S, columns) with heads of `size`, to (B, S, heads * size).

    `rotary` is (2, S, size), or (2 B, S, size): cosines and sines of each sample.
    `settings`: columns that 0 queries, 1 keys and 2 values begin at; 3 heads; 4 norm of
    queries and keys and 5 its epsilon by its bits; 6 whether they are rotated; 7 factor
    of the scores by its bits. `bias` broadcasts to (B, heads, S, S), or is empty.
    """

    @staticmethod
    def execute[
        target: StaticString,
    ](
        y: OutputTensor[rank=3, ...],
        x: InputTensor[rank=3, ...],
        norm: InputTensor[dtype=DType.float32, rank=2, ...],
        rotary: InputTensor[dtype=DType.float32, rank=3, ...],
        bias: InputTensor[dtype=DType.float32, rank=4, ...],
        settings: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime dtype = x.dtype
        var how = _settings(settings, 8)
        var mixed = rebind[Block[dtype]](_result(y))
        var first = _stream[dtype, Self.size](_block(x), _matrix(norm), _block(rotary), mixed, how)
        var second = first
        second.length = 0
        _attend[dtype, Self.size](x.dim_size(0), first, second, _bias(bias), how)


@extensibility.register("diffusion_joint_attention")
struct JointAttention[size: Int]:
    """The same of two streams of tokens, the second after the first, to one each."""

    @staticmethod
    def execute[
        target: StaticString,
    ](
        first_y: OutputTensor[rank=3, ...],
        second_y: OutputTensor[rank=3, ...],
        first_x: InputTensor[rank=3, ...],
        second_x: InputTensor[rank=3, ...],
        first_norm: InputTensor[dtype=DType.float32, rank=2, ...],
        second_norm: InputTensor[dtype=DType.float32, rank=2, ...],
        first_rotary: InputTensor[dtype=DType.float32, rank=3, ...],
        second_rotary: InputTensor[dtype=DType.float32, rank=3, ...],
        bias: InputTensor[dtype=DType.float32, rank=4, ...],
        settings: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime dtype = first_x.dtype
        var how = _settings(settings, 8)
        _check(
            first_x.dim_size(0) == second_x.dim_size(0), "attention: streams differ in samples"
        )
        var first = _stream[dtype, Self.size](
            _block(first_x),
            _matrix(first_norm),
            _block(first_rotary),
            rebind[Block[dtype]](_result(first_y)),
            how,
        )
        var second = _stream[dtype, Self.size](
            rebind[Block[dtype]](_block(second_x)),
            _matrix(second_norm),
            _block(second_rotary),
            rebind[Block[dtype]](_result(second_y)),
            how,
        )
        _attend[dtype, Self.size](first_x.dim_size(0), first, second, _bias(bias), how)


@fieldwise_init
struct Bias(Copyable, ImplicitlyCopyable, Movable):
    """What is added to scores: (B, heads, queries, keys), 1 of what it is the same for."""

    var start: Lanes
    var samples: Int
    var heads: Int
    var queries: Int
    var keys: Int


@always_inline
def _bias(tensor: InputTensor[dtype=DType.float32, rank=4, ...]) -> Bias:
    return Bias(
        tensor.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        tensor.dim_size(0),
        tensor.dim_size(1),
        tensor.dim_size(2),
        tensor.dim_size(3),
    )


def _stream[
    dtype: DType, size: Int
](
    tokens: Block[dtype],
    norm: Matrix[DType.float32],
    rotary: Block[DType.float32],
    y: Block[dtype],
    how: Settings,
) raises -> Stream[dtype]:
    """Tokens of one stream; `how` as in Attention."""
    var width = how[3] * size
    _check(
        max(max(how[0], how[1]), how[2]) + width <= tokens.third,
        "attention: rows have fewer columns",
    )
    _check(
        y.first == tokens.first and y.second == tokens.second and y.third == width,
        "attention: the output's shape is another",
    )
    if how[4] != NO_NORM:
        _check(
            norm.columns == size and norm.rows == (4 if how[4] == LAYER_NORM else 2),
            "attention: the norm's vectors have another shape",
        )
    _check(
        min(min(how[0], how[1]), how[2]) >= 0, "attention: a column is negative"
    )
    if how[6] != 0:
        _check(
            _fits(rotary.first // 2, tokens.first)
            and rotary.first % 2 == 0
            and rotary.second == tokens.second
            and rotary.third == size,
            "attention: the rotary table's shape is another",
        )
    return Stream[dtype](
        tokens.start,
        tokens.second,
        tokens.third,
        how[0],
        how[1],
        how[2],
        norm.start,
        rotary.start,
        0 if rotary.first == 2 else 2 * rotary.second * rotary.third,
        y.start,
    )


@always_inline
def _attend[
    dtype: DType, size: Int
](
    samples: Int, first: Stream[dtype], second: Stream[dtype], bias: Bias, how: Settings
) raises:
    """Multiplies bfloat16 where the processor does, and float32 where not."""
    comptime if dtype == DType.bfloat16:
        if may_use_matrix_unit():
            _attend_in[dtype, DType.bfloat16, size](samples, first, second, bias, how, True)
            return
        comptime if multiplies_bfloat16():
            _attend_in[dtype, DType.bfloat16, size](samples, first, second, bias, how, False)
            return
    _attend_in[dtype, DType.float32, size](samples, first, second, bias, how, False)


@no_inline
def _attend_in[
    dtype: DType, compute: DType, size: Int
](
    samples: Int, first: Stream[dtype], second: Stream[dtype], bias: Bias, how: Settings,
    has_unit: Bool,
) raises:
    var length = first.length + second.length
    var has_bias = bias.keys > 0
    if has_bias:
        _check(
            _fits(bias.samples, samples)
            and _fits(bias.heads, how[3])
            and _fits(bias.queries, length)
            and bias.keys == length,
            "attention: the bias has another shape than the scores",
        )
    var of_head = bias.keys * bias.queries
    var heads = Heads[dtype, compute, size](
        samples,
        how[3],
        first,
        second,
        how[4],
        how.number(5),
        how[6] != 0,
        how.number(7),
        has_bias,
        bias.start,
        of_head * bias.heads if bias.samples > 1 else 0,
        of_head if bias.heads > 1 else 0,
        bias.keys if bias.queries > 1 else 0,
        has_unit,
    )

    var is_parallel = 2 * samples * how[3] * size * length * length > ALONE
    var parts = heads.parts(team_size(is_parallel))
    var shared = unsafe_alloc[Scalar[DType.float32]](
        max(heads.shared_lanes(parts), 1), alignment=64
    )

    def body(team: Team, me: Int) {imm}:
        heads.share(team, me, parts, shared)

    run_team(2, is_parallel, body)
    shared.unsafe_free()


@always_inline
def _fits(size: Int, wanted: Int) -> Bool:
    return size == 1 or size == wanted
