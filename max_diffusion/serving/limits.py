"""What the servers allow of the pictures that requests bring."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.pictures import PictureInputs


def limits_on_pictures(
    inputs: PictureInputs | None,
    options: Mapping[str, object],
    most_read_pixels: int | None,
    max_size: int,
) -> list[tuple[str, int, int, str]]:
    """How large what is read of a request's pictures would be, and may be.

    A picture that is scaled to what is drawn is as large as that, and not listed.

    Args:
        inputs: The pictures; ``None`` where the request brings none.
        options: Of the request, as it names them.
        most_read_pixels: Most pixels of each, where the model reads them at their own
            sizes.
        max_size: Most pixels of a side of what is drawn.

    Returns:
        Rows of a name, a value, its limit and their unit.
    """
    most = max_size**2
    rows: list[tuple[str, int, int, str]] = []
    area = options.get("max_area")
    if isinstance(area, int):
        rows.append(("max_area", area, most, "pixels"))
    if inputs is None:
        return rows
    pixels = [image.height * image.width for image in inputs.images]
    if most_read_pixels is not None:
        unit = "pixels, as it is read at its own size"
        rows += [("image", min(each, most_read_pixels), most, unit) for each in pixels]
    elif options.get("auto_resize") is False:
        unit = "pixels without auto_resize"
        rows += [("image", each, most, unit) for each in pixels]
    return rows
