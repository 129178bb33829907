"""Compiles the graphs that ship with the package, and those that tests start from."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts"), str(ROOT / "examples")]

from folders import TEST_GRAPHS, make_flux_folder  # noqa: E402

from max_diffusion.errors import MaxDiffusionError  # noqa: E402
from max_diffusion.execution.artefacts import artefacts_in  # noqa: E402
from max_diffusion.execution.graph_library import shipped_graphs  # noqa: E402
from max_diffusion.execution.targets import HOSTS, Target  # noqa: E402
from max_diffusion.exporting import Export, Model, export_graphs  # noqa: E402

# Every group of graphs that a cache can need.
CACHES = "all,taylorseer:target=modules"
TEST_TARGETS = ("linux-x86-64-v3",)
HALF = ("transformer.full",)
"""Modules that tests also have in bfloat16."""
MOST_BYTES = 2 * 2**20


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
        build(Model(caches=CACHES, pictures=True), targets, shipped_graphs(), args.jobs)
        for target in HOSTS:
            check_size(shipped_graphs() / target)
        of_tests = [target for target in TEST_TARGETS if target in targets]
        with tempfile.TemporaryDirectory() as folder:
            path = str(make_flux_folder(Path(folder)))
            model = Model(path, caches=CACHES, pictures=True)
            build(model, of_tests, TEST_GRAPHS / "float32", args.jobs)
            half = Model(path, dtype="bfloat16")
            build(half, of_tests, TEST_GRAPHS / "bfloat16", args.jobs, HALF)
    except MaxDiffusionError as err:
        sys.exit(f"error: {err}")


def build(
    model: Model,
    targets: Sequence[str],
    folder: Path,
    jobs: int | None,
    modules: Sequence[str] = (),
) -> None:
    """Brings a folder of graphs up to date for some targets."""
    keys: dict[str, dict[str, str]] = {target: {} for target in targets}
    wanted = [Target(HOSTS[name]) for name in targets]
    export = Export(model, wanted, folder, modules, jobs)
    for done, total in export_graphs(export):
        manifest = done.artefact.manifest
        keys[manifest.target][manifest.name] = manifest.key
        took = f"{done.seconds:.0f} s" if done.seconds else "was there"
        print(f"{manifest.target} {manifest.name}: {took}, of {total}", flush=True)
    for target, own in keys.items():
        remove_others(folder / target, own)


def remove_others(folder: Path, keys: Mapping[str, str]) -> None:
    """Removes all files of a target but those of the given keys, by module."""
    needed: set[Path] = set()
    for name, key in keys.items():
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
