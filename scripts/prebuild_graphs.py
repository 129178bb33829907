"""Compiles the graphs that ship with the package, and those that tests start from."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts"), str(ROOT / "examples")]

from cogvideox_folder import VARIANTS, make_cogvideox_folder  # noqa: E402
from flux1_editing import make_fill_folder  # noqa: E402
from flux2_dev_folder import make_flux2_dev_folder  # noqa: E402
from flux2_folder import make_flux2_folder  # noqa: E402
from folders import TEST_GRAPHS, make_flux_folder  # noqa: E402
from new_model import write_folder as make_toy_folder  # noqa: E402
from qwen_folder import make_qwen_folder  # noqa: E402
from z_image_folder import make_z_image_folder  # noqa: E402

from max_diffusion.errors import MaxDiffusionError  # noqa: E402
from max_diffusion.execution.artefacts import artefacts_in  # noqa: E402
from max_diffusion.execution.graph_library import shipped_graphs  # noqa: E402
from max_diffusion.execution.targets import HOSTS, Target  # noqa: E402
from max_diffusion.exporting import Export, Model, export_graphs  # noqa: E402

TOY = ROOT / "examples" / "new_model.py"
# Every group of graphs that a cache can need.
CACHES = "all,taylorseer:target=modules"
TEST_TARGETS = ("linux-x86-64-v3",)
HALF_TARGETS = ("linux-x86-64-v4-bf16", "linux-x86-64-v3")
"""Those of tests in bfloat16, whose graphs are others where it is multiplied."""
HALF = ("transformer.full",)
"""Modules that tests also have in bfloat16."""
MOST_BYTES = 4 * 2**20
"""A target's graphs of both demo models; a test holds each to half of it."""


def main() -> None:
    """Compiles what is not today's, and removes what is no longer needed."""
    parser = argparse.ArgumentParser(prog="scripts/prebuild", description=__doc__)
    parser.add_argument(
        "--target",
        action="append",
        choices=tuple(HOSTS),
        help="only for this processor; may be repeated; default: all",
    )
    parser.add_argument("--jobs", type=int, help="compiled at a time, 3 GiB each")
    args = parser.parse_args()
    targets = args.target or tuple(HOSTS)
    try:
        demos = [
            Model("demo", caches=CACHES, pictures=True),
            Model("demo-video", caches="all"),
        ]
        build(demos, targets, shipped_graphs(), args.jobs)
        for target in HOSTS:
            check_size(shipped_graphs() / target)
        with tempfile.TemporaryDirectory() as folder:
            for name, models in models_of_tests(Path(folder)).items():
                is_half = name == "bfloat16"
                wanted = HALF_TARGETS if is_half else TEST_TARGETS
                own = [target for target in wanted if target in targets]
                modules = HALF if is_half else ()
                build(models, own, TEST_GRAPHS / name, args.jobs, modules)
    except MaxDiffusionError as err:
        sys.exit(f"error: {err}")


def models_of_tests(root: Path) -> dict[str, list[Model]]:
    """Writes the folders that tests draw with, and returns them by their graphs'."""
    flux = str(make_flux_folder(root / "flux"))
    fill = str(make_fill_folder(root / "flux", root / "fill"))
    toy = str(make_toy_folder(root / "toy"))
    qwen = str(make_qwen_folder(root / "qwen"))
    z_image = str(make_z_image_folder(root / "z-image"))
    klein = str(make_flux2_folder(root / "flux2-klein", is_distilled=True))
    dev = str(make_flux2_dev_folder(root / "flux2-dev"))
    videos = {
        variant: str(make_cogvideox_folder(root / variant, variant))
        for variant in VARIANTS
    }
    return {
        "float32": [
            Model(flux, caches=CACHES, pictures=True),
            # The same blocks between other ends.
            Model(fill, caches=CACHES, pictures=True),
        ],
        "bfloat16": [Model(flux, dtype="bfloat16")],
        "toy": [Model(toy, caches="all", plugins=(str(TOY),))],
        "qwen-image": [Model(qwen, caches=CACHES)],
        "z-image": [Model(z_image, caches=CACHES)],
        "flux2": [
            Model(klein, caches=CACHES, pictures=True),
            # Another text encoder, and a transformer that is told the guidance.
            Model(dev, caches=CACHES, pictures=True),
        ],
        "cogvideox": [
            Model(path, caches="all" if variant == "5b" else "none")
            for variant, path in videos.items()
        ],
    }


def build(
    models: Sequence[Model],
    targets: Sequence[str],
    folder: Path,
    jobs: int | None,
    modules: Sequence[str] = (),
) -> None:
    """Brings a folder of graphs up to date for some targets."""
    keys: dict[str, set[tuple[str, str]]] = {target: set() for target in targets}
    wanted = [Target(HOSTS[name]) for name in targets]
    for model in models:
        export = Export(model, wanted, folder, modules, jobs)
        for done, total in export_graphs(export):
            manifest = done.artefact.manifest
            keys[manifest.target].add((manifest.name, manifest.key))
            took = f"{done.seconds:.0f} s" if done.seconds else "was there"
            place = f"{folder.name} {manifest.target} {manifest.name}"
            print(f"{place}: {took}, of {total}", flush=True)
    for target, own in keys.items():
        remove_others(folder / target, own)


def remove_others(folder: Path, keys: set[tuple[str, str]]) -> None:
    """Removes all files of a target but those of the given modules and keys."""
    needed: set[Path] = set()
    for name, key in keys:
        for each in artefacts_in(folder, name):
            if each.manifest.key == key:
                needed |= {each.path, each.folder / f"{each.manifest.stem}.json"}
    for path in set(folder.glob("*")) - needed:
        path.unlink()
        print(f"removed {path.relative_to(ROOT)}")


def check_size(folder: Path) -> None:
    """Ends where a target's files have grown too large to ship."""
    total = sum(path.stat().st_size for path in folder.glob("*"))
    if total > MOST_BYTES:
        # MAX 26.7 puts what it compiles at different times into different objects.
        sys.exit(
            f"error: {folder} has {total:,} bytes, and {MOST_BYTES:,} may ship; what "
            "is compiled on a busy machine is up to twice as large: remove the largest "
            "and run again when nothing else does"
        )


if __name__ == "__main__":
    main()
