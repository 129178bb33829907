"""The convolution that graphs call. Sizes that do not fit are errors, as in `operations`."""
import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.memory.alloc import unsafe_alloc
from .convolution import Convolution, GroupNorm, Image
from .lanes import Address, in_lane, lane_count
from .operations import ALONE, Block, Matrix, Settings, _block, _check, _vector
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
        var added = _pixels(residual)
        _convolve[matrix.dtype, x.dtype, y.dtype](
            Pixels[y.dtype](
                y.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
                y.dim_size(0),
                y.dim_size(1),
                y.dim_size(2),
                y.dim_size(3),
            ),
            _pixels(x),
            _block(matrix),
            _vector(bias),
            _vector(gamma),
            _vector(beta),
            Pixels[y.dtype](
                added.start.unsafe_bitcast[Scalar[y.dtype]](),
                added.samples,
                added.height,
                added.width,
                added.channels,
            ),
            _vector(settings),
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
) raises:
    comptime pair = in_lane[compute]()
    _check(settings.columns == 10, "an operation has other settings")
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
    var multiplications = samples * height * width * kernel * kernel * lanes * columns
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
    var norm = GroupNorm[source](
        start,
        samples,
        x.height * x.width,
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
        activation,
    )
    var is_direct = (
        source == compute
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
    var convolution = Convolution[source, compute, result](
        image,
        samples,
        kernel,
        stride,
        height,
        width,
        is_direct,
        start.unsafe_bitcast[Float32](),
        matrix.start.unsafe_bitcast[Float32](),
        finish,
    )
    # One allocation: a strip, then the norm's moments and factors.
    var strip = ceildiv(0 if is_direct else convolution.buffer_lanes(), 16) * 16
    var moments = norm.moments_size() if groups > 0 else 0
    var factors = 2 * samples * channels if groups > 0 else 0
    var buffer = unsafe_alloc[Scalar[DType.float32]](
        max(strip + moments + factors, 1), alignment=64
    )
    if not is_direct:
        convolution.buffer = buffer
    convolution.image.norm.moments = buffer.unsafe_offset(strip)
    convolution.image.norm.factors = buffer.unsafe_offset(strip + moments)

    def body(team: Team, me: Int) {imm}:
        convolution.share(team, me)

    run_team(convolution.phases(), multiplications > ALONE, body)
    buffer.unsafe_free()
    ones.unsafe_free()
