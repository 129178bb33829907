"""Models of a hub, which is one on loopback: what is fetched, and what is enough."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import httpx
import processes
import pytest
from fake_hub import FakeHub, Repository, files_of
from folders import copy_folder
from huggingface_hub.errors import RevisionNotFoundError
from safetensors.torch import load_file
from single_files import as_bfl, saved

from max_diffusion import ModelLoadError
from max_diffusion.checkpoint import find_model
from max_diffusion.cli.main import main

# What is needed of the folder that `hub` serves.
NEEDED = {
    "model_index.json",
    "cache_calibration.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
OPEN = """
import json, sys
from max_diffusion.errors import ModelLoadError
from max_diffusion.pipelines.opening import open_folder
for arguments in json.loads(sys.argv[1]):
    try:
        folder, kind = open_folder(**arguments)
        kind.component_configs(folder)
        files = [f"{role}/{file.name}" for role in kind.components
                 for file in folder.weight_files(role)]
        print(json.dumps({"files": files, "path": str(folder.path)}))
    except ModelLoadError as err:
        print(json.dumps({"error": str(err)}))
"""


def rich_folder(source: Path, target: Path) -> Path:
    """A folder with much beside what text to image needs."""
    folder = copy_folder(source, target)
    (folder / "cache_calibration.json").write_text("{}")
    (folder / "README.md").write_text("# A model")
    (folder / "flux-dev.safetensors").write_bytes(b"a single-file checkpoint")
    for name in ("loras/style", "controlnet/diffusion_pytorch_model"):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir()
        path.write_bytes(b"not asked for: " + name.encode())
        (path.parent / "config.json").write_text("{}")
    for role, stem in (("transformer", "diffusion_pytorch_model"), ("vae", None)):
        name = f"{stem or 'diffusion_pytorch_model'}.fp16.safetensors"
        whole = folder / role / "diffusion_pytorch_model.safetensors"
        shutil.copy(whole, folder / role / name)
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "transformer" / "model.onnx").write_bytes(b"another format")
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.bf16.json").write_text(
        '{"weight_map": {"x": "nothing.safetensors"}}'
    )
    return folder


@pytest.fixture
def folder(flux_folder: Path, tmp_path: Path) -> Path:
    return rich_folder(flux_folder, tmp_path / "served")


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home)} | more


def open_here(
    hub: FakeHub | None,
    home: Path,
    *several: dict[str, Any],
    offline: bool = False,
    **arguments: Any,
) -> Any:
    """What a process of its own finds; without a hub, its address refuses.

    Of several models, a list.
    """
    more = {"HF_HUB_OFFLINE": "1"} if offline else {}
    url = hub.url if hub else "http://127.0.0.1:9"
    models = [{"path_or_repo_id": "one/model"} | x for x in several or (arguments,)]
    done = processes.run(
        *(sys.executable, "-c", OPEN, json.dumps(models)),
        env=environment(url, home, **more),
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return found if several else found[0]


def test_what_the_index_names_is_fetched_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    repository = Repository(files_of(folder))
    with FakeHub({"one/model": repository}) as hub:
        found, again = open_here(hub, tmp_path / "home", {}, {})
        assert sorted(repository.fetched) == sorted(NEEDED)
        assert len(found["files"]) == 4
        assert again == found
    # Without the hub, by its absence and by wish.
    assert open_here(None, tmp_path / "home") == found
    assert open_here(None, tmp_path / "home", offline=True) == found


def test_one_variant_is_fetched_and_the_plain_files_of_others(
    folder: Path, tmp_path: Path
) -> None:
    repository = Repository(files_of(folder))
    with FakeHub({"one/model": repository}) as hub:
        found = open_here(hub, tmp_path / "home", variant="fp16")
        fetched = set(repository.fetched)
        missing = open_here(hub, tmp_path / "home", variant="bf16")
    fp16 = {
        f"{role}/diffusion_pytorch_model.fp16.safetensors"
        for role in ("transformer", "vae")
    }
    plain = {name.replace(".fp16", "") for name in fp16}
    assert fetched == NEEDED - plain | fp16
    assert set(found["files"]) == fp16 | {
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    }
    assert missing["error"].startswith("one/model/")
    assert "nothing.safetensors" in missing["error"]


def test_of_what_a_checkpoint_file_holds_no_weights_are_fetched(
    folder: Path, tmp_path: Path
) -> None:
    name = "transformer/diffusion_pytorch_model.safetensors"
    file = saved(tmp_path / "flux", as_bfl(load_file(folder / name)))
    (folder / "cache_calibration.json").unlink()  # it would be read
    repository, home = Repository(files_of(folder)), tmp_path / "home"
    command = (*(sys.executable, "-m", "max_diffusion", "inspect"), "one/model")
    with FakeHub({"one/model": repository}) as hub:
        done = processes.run(
            *(*command, "--transformer", file, "--device", "cpu", "--json"),
            env=environment(hub.url, home),
        )
    assert done.returncode == 0, done.stderr
    assert set(repository.fetched) == NEEDED - {name, "cache_calibration.json"}
    assert json.loads(done.stdout)["components"]["transformer"]["parameters"] > 0


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_fetched_by_their_index(
    folder: Path, tmp_path: Path, variant: str | None
) -> None:
    files = files_of(folder)
    dotted = f".{variant}" if variant else ""
    role, stem = "text_encoder_2", "model"
    content = files.pop(f"{role}/{stem}.safetensors")
    shard = f"{stem}{dotted}-00001-of-00001.safetensors"
    index = f"{stem}.safetensors.index{dotted}.json"
    files[f"{role}/{shard}"] = content
    held = {"shared.weight": shard}
    files[f"{role}/{index}"] = json.dumps({"weight_map": held}).encode()
    # Shards of a set that is not asked for.
    other = f"{stem}.fp32-00001-of-00001.safetensors"
    files[f"{role}/{other}"] = content
    files[f"{role}/{stem}.safetensors.index.fp32.json"] = b"{}"
    repository = Repository(files)
    with FakeHub({"one/model": repository}) as hub:
        found = open_here(hub, tmp_path / "home", variant=variant)
    assert f"{role}/{shard}" in found["files"]
    of_role = {name for name in repository.fetched if name.startswith(role + "/")}
    assert of_role == {f"{role}/{name}" for name in ("config.json", index, shard)}


@pytest.mark.parametrize("who", ["diffusers", "everything"])
def test_a_cache_that_others_have_filled_is_enough(
    folder: Path, tmp_path: Path, who: str
) -> None:
    code = {
        "diffusers": "from diffusers import FluxPipeline as f; f.download('one/model')",
        # What `hf download one/model` does.
        "everything": "import huggingface_hub as h; h.snapshot_download('one/model')",
    }
    repository, home = Repository(files_of(folder)), tmp_path / "home"
    with FakeHub({"one/model": repository}) as hub:
        done = processes.run(
            sys.executable, "-c", code[who], env=environment(hub.url, home)
        )
        assert done.returncode == 0, done.stderr
    assert ("loras/style.safetensors" in repository.fetched) is (who == "everything")
    for offline in (True, False):
        assert len(open_here(None, home, offline=offline)["files"]) == 4
    # Also where the repository has gone on, or been closed.
    with FakeHub({"one/model": Repository({}, is_private=True)}) as hub:
        assert len(open_here(hub, home)["files"]) == 4


def test_a_cache_that_lacks_a_part_says_which(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with FakeHub({"one/model": Repository(files_of(folder))}) as hub:
        path = Path(open_here(hub, home)["path"])
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    error = open_here(None, home, offline=True)["error"]
    assert "HF_HUB_OFFLINE is set" in error
    assert "in the cache: one/model/vae: no safetensors weights" in error
    shutil.rmtree(path / "tokenizer_2")
    error = open_here(None, home)["error"]
    assert "hub could not be reached; check the network" in error
    assert "in the cache: one/model: the folder tokenizer_2 is missing" in error
    with FakeHub({"one/model": Repository(files_of(folder))}) as hub:
        assert len(open_here(hub, home)["files"]) == 4


def test_a_class_that_is_not_supported_is_refused_before_it_is_fetched(
    folder: Path, tmp_path: Path
) -> None:
    files = files_of(folder)
    index = json.loads(files["model_index.json"])
    wrong = index | {"_class_name": "FluxControlPipeline"}
    less = index | {"vae": [None, None]}
    repositories = {
        f"one/{name}": Repository(files | {"model_index.json": json.dumps(x).encode()})
        for name, x in (("control", wrong), ("less", less))
    }
    with FakeHub(repositories) as hub:
        control, null = open_here(
            hub, tmp_path, *({"path_or_repo_id": name} for name in repositories)
        )
    assert control["error"] == (
        "one/control: model_index.json names 'FluxControlPipeline'; supported are "
        "FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxKontextPipeline, "
        "FluxFillPipeline, CogVideoXPipeline, QwenImagePipeline, Flux2Pipeline, "
        "Flux2KleinPipeline, ZImagePipeline; "
        "others are made known by register_model, on the command line by --plugin"
    )
    assert null["error"] == (
        "one/less: model_index.json lists vae as null, so the model was saved without "
        "it; save the whole pipeline"
    )
    for repository in repositories.values():
        assert repository.fetched == ["model_index.json"]


def test_a_revision_is_taken_and_one_that_is_not_there_is_an_error(
    folder: Path, tmp_path: Path
) -> None:
    repository = Repository(files_of(folder), revisions=("refs/pr/3",))
    home = tmp_path / "home"
    with FakeHub({"one/model": repository}) as hub:
        revisions = ("refs/pr/3", repository.sha, "v9")
        found, by_commit, missing = open_here(
            hub, home, *({"revision": revision} for revision in revisions)
        )
    assert found["path"].endswith(repository.sha)
    assert open_here(None, home, revision="refs/pr/3") == found == by_commit
    assert missing["error"] == (
        "model: one/model has no revision 'v9'; give a branch, a tag or a commit that "
        "the hub lists"
    )


def test_what_the_hub_refuses_is_one_line(folder: Path, tmp_path: Path) -> None:
    files = files_of(folder)
    repositories = {
        "a/gated": Repository(files, is_gated=True),
        "a/private": Repository(files, is_private=True),
        "a/broken": Repository(files, status=500),
        "a/token": Repository(files, status=401),
        "a/other": Repository({"README.md": b"#"}),
        "a/part": Repository({k: v for k, v in files.items() if k[:3] != "vae"}),
        "a/pickles": Repository(
            {
                name.replace("vae/diffusion_pytorch_model.safetensors", "vae/x.bin"): x
                for name, x in files.items()
                if ".fp16." not in name
            }
        ),
    }
    expected = {
        "a/gated": "model: a/gated is gated; accept its licence on the hub and log in",
        "a/private": "model: a/private is neither a folder here nor a repository on",
        "a/nowhere": "model: a/nowhere is neither a folder here nor a repository on",
        "a/broken": "model: a/broken could not be fetched (the hub answered 500); try",
        "a/token": "model: a/token could not be fetched (the hub answered 401); log in",
        "a/other": "model: a/other has no model_index.json; expected a model in the di",
        "a/part": "model: a/part has no folder vae, though model_index.json lists it",
        "a/pickles": "a/pickles/vae: no safetensors weights; only x.bin, a pickle",
        "a--b/x": "model: 'a--b/x' is no folder here, and no hub repository is named",
    }
    with FakeHub(repositories) as hub:
        names = [{"path_or_repo_id": name} for name in expected]
        found = open_here(hub, tmp_path / "home", *names)
    for answer, message in zip(found, expected.values(), strict=True):
        assert answer["error"].startswith(message)
        assert "\n" not in answer["error"]


@pytest.mark.parametrize("is_shown", [True, False])
def test_progress_of_a_download_is_shown_where_it_is_asked_for(
    folder: Path, tmp_path: Path, is_shown: bool
) -> None:
    models = [{"path_or_repo_id": "one/model", "show_progress": is_shown}]
    with FakeHub({"one/model": Repository(files_of(folder))}) as hub:
        done = processes.run(
            *(sys.executable, "-c", OPEN, json.dumps(models)),
            env=environment(hub.url, tmp_path / "home"),
        )
    assert len(json.loads(done.stdout)["files"]) == 4
    assert (f"Fetching {len(NEEDED)} files" in done.stderr) is is_shown
    assert is_shown or done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "a", "--output", "x.png", "--model"),
        ("inspect",),
        ("calibrate", "--output", "x.json", "--model"),
        ("calibrate", "--model"),
        ("compare", "a", "--model"),
        ("tune", "--target-psnr", "40", "--model"),
    ],
)
def test_the_command_line_takes_a_revision(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    def refuse(self: object, name: str, **options: object) -> None:
        request = httpx.Request("GET", "http://hub")
        response = httpx.Response(404, request=request)
        raise RevisionNotFoundError(str(options["revision"]), response=response)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*words, "one/model", "--revision", "v9", "--device", "cpu"])
    assert end.value.code == 3
    assert capsys.readouterr().err == (
        "error: model: one/model has no revision 'v9'; give a branch, a tag or a "
        "commit that the hub lists\n"
    )


def test_the_server_takes_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "max_diffusion.serving.http.run.serve",
        lambda model, *_, **__: given.append(model),
    )
    with pytest.raises(SystemExit):
        main(["serve", "--model", "one/model", "--revision", "v9"])
    assert (given[0].path, given[0].revision) == ("one/model", "v9")


@pytest.mark.parametrize("words", [("generate", "a", "--model"), ("inspect",)])
def test_a_revision_of_a_model_that_is_here_is_an_error(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "demo", "--revision", "v9"])
    assert end.value.code == 3
    told = capsys.readouterr().err
    assert "is a folder here, and revision 'v9' is for models of the hub" in told


def test_an_answer_that_is_no_hubs_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def portal(self: object, name: str, **options: object) -> None:
        json.loads("<html>Please log in</html>")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", portal)
    with pytest.raises(ModelLoadError, match="the hub could not be reached; check the"):
        find_model("nobody/no-such-model-here")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(self: object, name: str, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", full)
    with pytest.raises(ModelLoadError) as caught:
        find_model("nobody/no-such-model-here")
    assert str(caught.value) == (
        "model: nobody/no-such-model-here could not be stored "
        f"({os.strerror(code)}); make room, or set HF_HOME to another folder"
    )
