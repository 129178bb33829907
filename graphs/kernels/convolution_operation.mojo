"""Convolutions that graphs call. Sizes that do not fit are errors, as in `operations`."""
import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.memory.alloc import unsafe_alloc
from .convolution import FRAMES, Convolution, Filters
from .images import Frames, GroupNorm, Image, Modulation
from .lanes import Address, Lanes, in_lane, lane_count
from .matrix_unit import may_use_matrix_unit
from .operations import ALONE, UNIT_ALONE, Block, Matrix, Settings, _block, _check, _vector
from .product import Finish, NO_ACTIVATION
from .team import Team, run_team
from .tile import PANEL


@fieldwise_init
struct Pixels[dtype: DType](Copyable, ImplicitlyCopyable, Movable):
    """A tensor of four axes, NHWC."""

    var start: Address[Self.dtype]
    var samples: Int
    var height: Int
    var width: Int
    var channels: Int


@always_inline
def _pixels[
    dtype: DType
](tensor: InputTensor[dtype=dtype, rank=4, ...]) -> Pixels[dtype]:
    return Pixels[dtype](
        tensor.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        tensor.dim_size(0),
        tensor.dim_size(1),
        tensor.dim_size(2),
        tensor.dim_size(3),
    )


@always_inline
def _written[dtype: DType](tensor: OutputTensor[dtype=dtype, rank=4, ...]) -> Pixels[dtype]:
    return Pixels[dtype](
        tensor.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        tensor.dim_size(0),
        tensor.dim_size(1),
        tensor.dim_size(2),
        tensor.dim_size(3),
    )


@fieldwise_init
struct OverTime[dtype: DType](Copyable, ImplicitlyCopyable, Movable):
    """What a convolution of a video has beside that of images."""

    var matrices: Filters
    var filters: Int
    """Frames of a filter; 1 of images, for which nothing else counts."""
    var before: Pixels[Self.dtype]
    var first: Matrix[DType.int64]
    var last: Matrix[DType.int64]
    var kept: Pixels[Self.dtype]
    var modulation: Pixels[DType.float32]
    """As many frames as x; empty without any."""


@extensibility.register("diffusion_convolution")
struct ConvolutionOperation:
    """Computes convolution(zoomed(activation(norm(x)))) + bias + residual, of NHWC.

    Inputs of the matrix are (kernel, kernel, C), C padded to whole lanes. `settings`:
    0 kernel, 1 stride; zeros before the first and after the last 2, 3 row and 4, 5
    column; 6 groups of the norm, 0 of none, and 7 its epsilon by its bits;
    8 activation; 9 how often each pixel is repeated in both directions.
    """

    @staticmethod
    def execute[
        target: StaticString,
    ](
        y: OutputTensor[rank=4, ...],
        x: InputTensor[rank=4, ...],
        matrix: InputTensor[rank=3, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        gamma: InputTensor[dtype=DType.float32, rank=1, ...],
        beta: InputTensor[dtype=DType.float32, rank=1, ...],
        residual: InputTensor[rank=4, ...],
        settings: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime assert residual.dtype == y.dtype, "convolution: the residual's dtype is another"
        var packed = _block(matrix)
        var start = packed.start.unsafe_bitcast[Float32]()
        var nothing = Pixels[x.dtype](_pixels(x).start, 0, 0, 0, 0)
        var no_index = Matrix[DType.int64](_vector(settings).start.unsafe_bitcast[Int64](), 0, 0)
        _convolve[matrix.dtype, x.dtype, y.dtype](
            _written(y),
            _pixels(x),
            packed,
            _vector(bias),
            _vector(gamma),
            _vector(beta),
            _as[y.dtype](_pixels(residual)),
            _vector(settings),
            OverTime[x.dtype](
                Filters(start, start, start),
                1,
                nothing,
                no_index,
                no_index,
                nothing,
                Pixels[DType.float32](_vector(bias).start, 0, 0, 0, 0),
            ),
        )


@extensibility.register("diffusion_frame_convolution")
struct FrameConvolutionOperation:
    """Computes the same of a video's frames with filters of three frames each.

    A result sees its own frame and two before it: of `first` and `last`, one after the
    other, those at its own place and the next two. They are indices of the frames
    `before`, which are as they were kept, then of x's frames, which are normed, all of
    them together; `scaled` by what is given for coarser pixels, if that is not empty;
    and activated. The frames at `last` are kept.

    `settings` are the same, with the norm's scale and shift by their first column as 10
    and 11.
    """

    @staticmethod
    def execute[
        target: StaticString,
    ](
        y: OutputTensor[rank=4, ...],
        kept: OutputTensor[rank=4, ...],
        x: InputTensor[rank=4, ...],
        before: InputTensor[rank=4, ...],
        first: InputTensor[dtype=DType.int64, rank=1, ...],
        last: InputTensor[dtype=DType.int64, rank=1, ...],
        matrix: InputTensor[rank=3, ...],
        second: InputTensor[dtype=matrix.dtype, rank=3, ...],
        third: InputTensor[dtype=matrix.dtype, rank=3, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        gamma: InputTensor[dtype=DType.float32, rank=1, ...],
        beta: InputTensor[dtype=DType.float32, rank=1, ...],
        modulation: InputTensor[dtype=DType.float32, rank=4, ...],
        residual: InputTensor[rank=4, ...],
        settings: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime assert residual.dtype == y.dtype, "convolution: the residual's dtype is another"
        comptime assert before.dtype == x.dtype, "convolution: before's dtype is another"
        comptime assert kept.dtype == x.dtype, "convolution: the kept frames' dtype is another"
        var packed = _block(matrix)
        var others = [_block(second), _block(third)]
        for other in others:
            _check(
                other.first == packed.first
                and other.second == packed.second
                and other.third == packed.third,
                "convolution: the filter's frames are of different sizes",
            )
        _convolve[matrix.dtype, x.dtype, y.dtype](
            _written(y),
            _pixels(x),
            packed,
            _vector(bias),
            _vector(gamma),
            _vector(beta),
            _as[y.dtype](_pixels(residual)),
            _vector(settings),
            OverTime[x.dtype](
                Filters(
                    packed.start.unsafe_bitcast[Float32](),
                    others[0].start.unsafe_bitcast[Float32](),
                    others[1].start.unsafe_bitcast[Float32](),
                ),
                FRAMES,
                _as[x.dtype](_pixels(before)),
                _vector(first),
                _vector(last),
                _as[x.dtype](_written(kept)),
                _pixels(modulation),
            ),
        )


@always_inline
def _as[dtype: DType](pixels: Pixels) -> Pixels[dtype]:
    """Of the same dtype by another name."""
    return Pixels[dtype](
        pixels.start.unsafe_bitcast[Scalar[dtype]](),
        pixels.samples,
        pixels.height,
        pixels.width,
        pixels.channels,
    )


# Called with numbers, not with tensors whose sizes MAX knows: see `operations`.
@no_inline
def _convolve[
    compute: DType, source: DType, result: DType
](
    y: Pixels[result],
    x: Pixels[source],
    matrix: Block[compute],
    bias: Matrix[DType.float32],
    gamma: Matrix[DType.float32],
    beta: Matrix[DType.float32],
    residual: Pixels[result],
    settings: Matrix[DType.int32],
    over_time: OverTime[source],
) raises:
    comptime pair = in_lane[compute]()
    var is_video = over_time.filters > 1
    _check(settings.columns == (12 if is_video else 10), "an operation has other settings")
    var how = Settings(settings.start)
    var kernel = how[0]
    var stride = how[1]
    var groups = how[6]
    var activation = how[8]
    var zoom = how[9]
    var samples = x.samples
    var channels = x.channels
    var columns = y.channels
    _check(kernel >= 1 and stride >= 1 and zoom >= 1, "convolution: settings")
    _check(
        min(min(how[2], how[3]), min(how[4], how[5])) >= 0, "convolution: negative padding"
    )
    _check(
        min(min(samples, channels), min(x.height, x.width)) >= 1 and columns >= 1,
        "convolution: x is empty",
    )
    var padded_height = how[2] + x.height * zoom + how[3]
    var padded_width = how[4] + x.width * zoom + how[5]
    _check(
        padded_height >= kernel and padded_width >= kernel,
        "convolution: x is smaller than the filter",
    )
    var height = (padded_height - kernel) // stride + 1
    var width = (padded_width - kernel) // stride + 1
    _check(
        y.samples == samples and y.height == height and y.width == width,
        "convolution: y has another shape",
    )
    var lanes = lane_count[compute](channels)
    _check(
        matrix.second == kernel * kernel * lanes,
        "convolution: the matrix has other inputs",
    )
    _check(matrix.third == PANEL * pair, "convolution: the matrix is not packed")
    _check(
        columns <= matrix.first * PANEL, "convolution: the matrix has fewer channels"
    )
    var has_bias = bias.columns > 0
    _check(not has_bias or bias.columns >= columns, "convolution: bias is shorter")
    if groups != 0:
        _check(groups > 0 and channels % max(groups, 1) == 0, "convolution: groups")
        _check(
            gamma.columns == channels and beta.columns == channels,
            "convolution: the norm has other channels",
        )
    var has_residual = residual.samples > 0
    if has_residual:
        _check(
            residual.samples == y.samples
            and residual.height == y.height
            and residual.width == y.width
            and residual.channels == y.channels,
            "convolution: the residual is not like y",
        )
    var frames = Frames[source](
        over_time.filters,
        samples,
        over_time.before.start,
        over_time.first.start,
        over_time.last.start,
        over_time.kept.start,
    )
    var modulation = Modulation(over_time.modulation.start, 0, 0, 0, 0, 0, 0)
    if is_video:
        _check(zoom == 1 and stride == 1, "convolution: settings of a video")
        _check_frames(x, over_time)
        modulation = _modulation(x, over_time.modulation, how[10], how[11])
        _check(modulation.zoom == 0 or groups > 0, "convolution: no norm to scale")
    var multiplications = samples * height * width * kernel * kernel * lanes * columns
    multiplications *= over_time.filters
    # A residual is gated; this gate is open.
    var ones = unsafe_alloc[Scalar[DType.float32]](columns, alignment=64)
    for i in range(columns):
        ones.unsafe_offset(i).unsafe_store(Float32(1))
    var finish = Finish[result](
        y.start,
        0,
        columns,
        has_bias,
        bias.start,
        NO_ACTIVATION,
        0,
        has_residual,
        ones,
        0,
        1,
        residual.start,
    )
    var start = x.start
    # Frames are normed together.
    var norm = GroupNorm[source](
        start,
        1 if is_video else samples,
        x.height * x.width * (samples if is_video else 1),
        channels,
        groups,
        how.number(7),
        gamma.start,
        beta.start,
        ones,
        ones,
    )
    var image = Image[source, compute](
        start,
        x.height,
        x.width,
        channels,
        lanes * pair,
        zoom,
        how[2],
        how[4],
        padded_width,
        norm,
        modulation,
        activation,
        frames,
    )
    var is_direct = (
        not is_video
        and source == compute
        and channels % pair == 0
        and groups == 0
        and activation == NO_ACTIVATION
        and zoom == 1
        and max(max(how[2], how[3]), max(how[4], how[5])) == 0
    )
    if is_direct and kernel == 1 and stride == 1:
        # All pixels are one row.
        width *= samples * height
        image.width = width
        image.padded_width = width
        image.height = 1
        height = 1
        samples = 1
    var has_unit = False
    comptime if compute == DType.bfloat16:
        has_unit = may_use_matrix_unit()
    var convolution = Convolution[source, compute, result](
        image,
        samples,
        kernel,
        stride,
        height,
        width,
        is_direct,
        start.unsafe_bitcast[Float32](),
        over_time.matrices,
        finish,
        has_unit,
    )
    # One allocation: a strip, then the norm's moments and factors.
    var strip = ceildiv(0 if is_direct else convolution.buffer_lanes(), 16) * 16
    var moments = norm.moments_size() if groups > 0 else 0
    var factors = 2 * norm.samples * channels if groups > 0 else 0
    var buffer = unsafe_alloc[Scalar[DType.float32]](
        max(strip + moments + factors, 1), alignment=64
    )
    if not is_direct:
        convolution.buffer = buffer
    convolution.image.norm.moments = buffer.unsafe_offset(strip)
    convolution.image.norm.factors = buffer.unsafe_offset(strip + moments)

    def body(team: Team, me: Int) {imm}:
        convolution.share(team, me)

    var alone = UNIT_ALONE if has_unit else ALONE
    run_team(convolution.phases(), multiplications > alone, body)
    buffer.unsafe_free()
    ones.unsafe_free()


def _check_frames[dtype: DType](x: Pixels[dtype], over_time: OverTime[dtype]) raises:
    """Checks what is around the frames of x."""
    var others = over_time.filters - 1
    var before = over_time.before
    _check(
        before.samples == others
        and before.height == x.height
        and before.width == x.width
        and before.channels == x.channels,
        "convolution: the frames before are not like x",
    )
    var kept = over_time.kept
    _check(
        kept.samples == others
        and kept.height == x.height
        and kept.width == x.width
        and kept.channels == x.channels,
        "convolution: the kept frames are not like x",
    )
    _check(
        over_time.first.columns == x.samples and over_time.last.columns == others,
        "convolution: not an index for every frame",
    )
    for i in range(x.samples + others):
        var index = over_time.first.start.unsafe_offset(i)
        if i >= x.samples:
            index = over_time.last.start.unsafe_offset(i - x.samples)
        var frame = Int(index.unsafe_load())
        _check(frame >= 0 and frame < x.samples + others, "convolution: no such frame")


def _modulation[
    dtype: DType
](x: Pixels[dtype], given: Pixels[DType.float32], scale: Int, shift: Int) raises -> Modulation:
    if given.samples == 0:
        return Modulation(given.start, 0, 0, 0, 0, 0, 0)
    _check(
        given.samples == x.samples and min(given.height, given.width) >= 1,
        "convolution: scales of other frames",
    )
    var zoom = x.height // given.height
    _check(
        zoom >= 1 and x.height == given.height * zoom and x.width == given.width * zoom,
        "convolution: scales of another size",
    )
    _check(
        min(scale, shift) >= 0 and max(scale, shift) + x.channels <= given.channels,
        "convolution: scales of other channels",
    )
    return Modulation(
        given.start, given.height, given.width, given.channels, scale, shift, zoom
    )
