"""Pictures that a model reads as references, in MAX's own server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flux1_editing import as_pipeline
from flux2_folder import make_flux2_folder
from folders import TEST_GRAPHS
from max_serving import PROMPT, as_uri, body, message_of, serving
from pictures import scene

from max_diffusion import TextToImagePipeline, demo_model_path, load_pipeline


def refusal(answer: Any) -> str:
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


def test_kontext_reads_a_reference(
    demo_kontext: TextToImagePipeline, tmp_path: Path
) -> None:
    model = as_pipeline(demo_model_path(), tmp_path / "model", "FluxKontextPipeline")
    image, other = scene(48, 80, seed=2), scene(64, 64, seed=3)
    own = {"metadata": {"auto_resize": "false"}}
    limits = {"PICTURES": "1", "MAX_SIZE": "160"}
    with serving(model, tmp_path, limits) as server:
        for picture in (image, other):
            expected = demo_kontext.generate(
                PROMPT,
                image=picture,
                seed=7,
                num_inference_steps=6,
                height=128,
                width=160,
                auto_resize=False,
            )
            fields = {"image": {"steps": 6, "height": 128, "width": 160}} | own
            asked = body(input=message_of(as_uri(picture)), **fields)
            np.testing.assert_array_equal(server.images(asked), expected.images)
        free = body(input=message_of(as_uri(image)))
        # Its picture is of the nearest size that Kontext was trained with.
        assert "at most 160 pixels, got" in refusal(server.post(free))
        large = message_of(as_uri(scene(161, 160)))
        said = refusal(server.post(body(input=large, **own)))
        assert said == (
            "image: this server allows at most 25600 pixels without auto_resize, got "
            "25760"
        )
        area = body(input=message_of(as_uri(image)), metadata={"max_area": "25601"})
        assert "max_area: this server allows at most 25600" in refusal(
            server.post(area)
        )


def test_flux2_reads_references(tmp_path: Path) -> None:
    model = make_flux2_folder(tmp_path / "model", is_distilled=False)
    graphs = TEST_GRAPHS / "flux2"
    pipeline = load_pipeline(model, "cpu", precompiled=[graphs], takes_pictures=True)
    images = [scene(40 + 16 * i, 56, seed=i) for i in range(3)]
    own = {"PICTURES": "1", "PRECOMPILED": str(graphs), "MAX_SIZE": "160"}
    drawn = {"steps": 3, "height": 128, "width": 144, "true_cfg_scale": 3.0}
    with serving(model, tmp_path, own) as server:
        for count in (0, 1, 3):
            expected = pipeline.generate(
                PROMPT,
                image=images[:count] or None,
                seed=7,
                num_inference_steps=3,
                height=128,
                width=144,
                true_cfg_scale=3.0,
            )
            sent = message_of(*map(as_uri, images[:count]))
            np.testing.assert_array_equal(
                server.images(body(input=sent, image=drawn)), expected.images
            )
        large = body(input=message_of(as_uri(scene(176, 160))))
        said = refusal(server.post(large))
        assert "image: this server allows at most 25600 pixels, as it is read" in said
