r"""This package's pipelines in MAX's own server, ``max serve``. Optional.

MAX imports it by name and registers what ``ARCHITECTURES`` lists:

    export MAX_SERVE_API_TYPES='["openai","responses"]' MAX_SERVE_HOST=127.0.0.1
    model=$(python -c 'import max_diffusion; print(max_diffusion.demo_model_path())')
    max serve --custom-architectures max_diffusion.serving.max_serve --devices cpu \
        --model "$model" --served-model-name demo

``POST /v1/responses`` then draws. The prompt is ``input``, the seed is ``seed``, and
``provider_options.image`` holds size, steps, guidance, negative prompt, number and
format of the images; the format is jpeg, MAX's own default, if it is not given. Of a
model that draws videos it is ``provider_options.video``, with ``num_frames`` and
``frames_per_second``. MAX writes 16 a second where that is not given, so it is asked
for where the model's own number is another. The answer has a URL of the mp4.

What MAX has no field for goes in ``metadata``. MAX lets only text through, so numbers
and lists are written as JSON, and text as it is:

    cache                 name of a denoising cache
    cache_option.OPTION   a setting of that cache: "3", "0.1", "official", "[0, 5, 9]"
    cache_memory_limit    most bytes that the cache's state may take
    lora.NAME             weight of a LoRA that the server was started with: "0.8"
    sigmas                a schedule of the caller's: "[1.0, 0.7, 0.4]"

A picture to start from is an ``input_image`` beside the ``input_text`` of the user's
message, as a ``data:`` URI, with ``strength`` in ``provider_options.image``. MAX has no
field for a mask.

Which caches and LoRAs requests may name, whether they may bring pictures, and what they
may ask at most, comes from the environment: see ``settings``. MAX's flags
``--taylorseer``, ``--first-block-caching`` and those beside them set the cache of
requests that name none.
"""

from __future__ import annotations

try:
    from .architecture import ARCHITECTURES
except ImportError as err:
    if (err.name or "").split(".")[0] in ("graphs", "max_diffusion"):
        raise
    raise ImportError(
        f"max_diffusion.serving.max_serve: needs the server of MAX 26.7 ({err}); "
        'install it with: pip install "max[serve]==26.7.*"',
        name=err.name,
    ) from err

__all__ = ["ARCHITECTURES"]
