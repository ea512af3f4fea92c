"""A bundle is written whole or not at all, and read only if every part of it is as it says."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from export.contract.bundle import BundleWriter, open_bundle, stage_bundle, write_bundle
from export.contract.manifest import Delegation, Experts, SpecialTokens, TokenizerInfo
from quantize.errors import BundleError, OutputError
from tests.support import toy_model

PROGRAMS = {"layers.pte": b"layers" * 1000, "head.pte": b"head" * 1000}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", toy_model.manifest(), PROGRAMS)
    return tmp_path / "bundle"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((folder / "bundle.json").read_text())
    change(document)
    (folder / "bundle.json").write_text(json.dumps(document))


def names_beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_a_written_manifest_reads_back_equal(tmp_path: Path) -> None:
    manifest = toy_model.manifest(
        experts=Experts("gather", {"dense": 2.5, "gather": 1.0}),
        tokenizer=TokenizerInfo("text/tokenizer.json", "{{ messages }}"),
        recipe={"name": "int4-g32", "rules": []},
    )
    layers, head = manifest.stages
    delegation = Delegation(2, {"linear": 7}, {"embedding": 1})
    other = replace(head, backend="vulkan", data_file="layers.pte")
    manifest = replace(manifest, stages=(replace(layers, delegation=delegation), other))
    assert manifest.backends == ("portable", "vulkan")
    files = PROGRAMS | {"text/tokenizer.json": b"{}"}
    written = write_bundle(tmp_path / "bundle", manifest, files)
    read = open_bundle(tmp_path / "bundle")
    assert read.manifest == manifest == written.manifest
    assert read.verified and not written.verified
    assert {name: read.path(name).read_bytes() for name in read.files} == files
    assert read.total_bytes == sum(len(content) for content in files.values())


def test_the_same_content_gives_the_same_bytes(tmp_path: Path, bundle: Path) -> None:
    write_bundle(tmp_path / "again", toy_model.manifest(), PROGRAMS)
    assert (tmp_path / "again/bundle.json").read_bytes() == (bundle / "bundle.json").read_bytes()


def test_files_can_come_from_other_places(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(b"x" * 3_000_000)
    seen: list[tuple[int, int]] = []
    bundle = write_bundle(
        tmp_path / "bundle",
        toy_model.manifest(),
        {"layers.pte": tmp_path / "program", "head.pte": b"h"},
        progress=lambda done, total, what: seen.append((done, total)),
    )
    assert bundle.files["layers.pte"].bytes == 3_000_000
    assert seen[-1] == (3_000_001, 3_000_001) and len(seen) > 3


# --- what is refused ---------------------------------------------------------------------------


def change_field(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = to

    return change


REFUSED_MANIFESTS = {
    "a newer schema version": (change_field("schema_version", to=2), "schema version 2.*update"),
    "an older schema version": (
        change_field("schema_version", to=0),
        "schema version 0.*export the bundle again",
    ),
    "a schema version that is no integer": (change_field("schema_version", to="1"), "'1'"),
    "a schema version that is true": (change_field("schema_version", to=True), "True"),
    "a style that is not known": (change_field("style", to="telepathy"), "style.*telepathy"),
    "a field that is not known": (change_field("colour", to="red"), "colour"),
    "a field of the model that is not known": (change_field("model", "wings", to=2), "wings"),
    "a vocabulary of no tokens": (change_field("model", "vocabulary_size", to=0), "vocabulary"),
    "another random generator": (change_field("random", "generator", to="mt19937"), "mt19937"),
    "no stages": (change_field("stages", to=[]), "stages"),
    "an end token outside of the vocabulary": (
        change_field("special_tokens", "eos", to=[29]),
        "29",
    ),
    "a canvas longer than the context": (
        change_field("model", "maximum_context", to=5),
        "canvas of 6",
    ),
    "a hash that is no hash": (
        change_field("files", "head.pte", "sha256", to="abc"),
        "files.head.pte.sha256",
    ),
    "delegation that counts below zero": (
        change_field(
            "stages",
            0,
            "delegation",
            to={"delegates": 1, "delegated": {"tail": -1}, "portable": {}},
        ),
        r"stages\.0\.delegation\.delegated\.tail",
    ),
    "a stage without its backend": (
        lambda document: document["stages"][1].pop("backend"),
        r"stages\.1 .*backend",
    ),
}


@pytest.mark.parametrize("case", REFUSED_MANIFESTS)
def test_refused_with_one_sentence(bundle: Path, case: str) -> None:
    change, says = REFUSED_MANIFESTS[case]
    edit(bundle, change)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert re.search(says, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(bundle: Path) -> None:
    edit(bundle, lambda document: document.pop("sampler"))
    with pytest.raises(BundleError, match="sampler"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["../outside.pte", "/etc/hostname", "a/../../x", "./a", "a//b", "c:evil", "a\\..\\b"]
)
def test_a_file_name_that_leads_out_of_the_bundle_is_refused(bundle: Path, name: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["files"][name] = document["files"].pop("head.pte")
        document["stages"][1]["file"] = name

    edit(bundle, change)
    with pytest.raises(BundleError, match="not a plain relative path"):
        open_bundle(bundle)


def test_a_link_that_leads_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.pte").write_bytes(PROGRAMS["head.pte"])
    (bundle / "head.pte").unlink()
    (bundle / "head.pte").symlink_to(tmp_path / "outside.pte")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        open_bundle(bundle)


def test_a_link_to_itself_is_refused(bundle: Path) -> None:
    (bundle / "head.pte").unlink()
    (bundle / "head.pte").symlink_to("head.pte")
    with pytest.raises(BundleError, match=r"head\.pte"):
        open_bundle(bundle)


def test_a_bundle_may_itself_be_reached_through_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert open_bundle(tmp_path / "link").verified


def test_a_missing_file_is_refused(bundle: Path) -> None:
    (bundle / "head.pte").unlink()
    with pytest.raises(BundleError, match=r"head\.pte is missing"):
        open_bundle(bundle)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_refused_even_without_hashing(bundle: Path, verify: bool) -> None:
    os.truncate(bundle / "layers.pte", 100)
    with pytest.raises(BundleError, match="has 100 bytes, expected 6000"):
        open_bundle(bundle, verify=verify)


def test_one_flipped_bit_is_found_by_hashing_alone(bundle: Path) -> None:
    content = bytearray((bundle / "layers.pte").read_bytes())
    content[3000] ^= 1
    (bundle / "layers.pte").write_bytes(content)
    assert not open_bundle(bundle, verify=False).verified
    with pytest.raises(BundleError, match=r"layers\.pte is damaged"):
        open_bundle(bundle)


def test_a_folder_where_a_file_should_be_is_refused(bundle: Path) -> None:
    (bundle / "head.pte").unlink()
    (bundle / "head.pte").mkdir()
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ('{"schema_version": 1', "not valid JSON"),
        ("[1]", "JSON list"),
        ("\ufeff{}", "not valid JSON"),
        ('{"schema_version": NaN}', "NaN"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "schema_version None"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(bundle: Path, text: str, says: str) -> None:
    (bundle / "bundle.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=says):
        open_bundle(bundle)


def test_bytes_that_are_no_text_are_refused(bundle: Path) -> None:
    (bundle / "bundle.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="not valid JSON"):
        open_bundle(bundle)


def test_a_folder_without_a_manifest_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="is not a folder"):
        open_bundle(tmp_path / "nowhere")


# --- writing -----------------------------------------------------------------------------------


def test_a_manifest_that_names_an_absent_file_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"head\.pte"):
        write_bundle(tmp_path / "bundle", toy_model.manifest(), {"layers.pte": b"x"})
    assert names_beside(tmp_path / "bundle") == []


def test_a_manifest_with_an_impossible_token_is_not_written(tmp_path: Path) -> None:
    manifest = replace(toy_model.manifest(), special_tokens=SpecialTokens(eos=(1000,)))
    with pytest.raises(BundleError, match="1000"):
        write_bundle(tmp_path / "bundle", manifest, PROGRAMS)
    assert names_beside(tmp_path / "bundle") == []


def test_a_block_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="finish"), stage_bundle(tmp_path / "b") as writer:
        writer.path("layers.pte").write_bytes(b"x")
    assert names_beside(tmp_path / "b") == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        raise interruption

    with pytest.raises(interruption):
        write_bundle(tmp_path / "b", toy_model.manifest(), PROGRAMS, progress=interrupt)
    assert names_beside(tmp_path / "b") == []


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel itself refuses to write the file beyond this size, with EFBIG.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="does not fit on the disk"):
            write_bundle(tmp_path / "b", toy_model.manifest(), PROGRAMS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_beside(tmp_path / "b") == []


def test_a_disk_that_fills_up_while_the_manifest_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(self: Path, *arguments: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="does not fit"):
        patch.setattr(Path, "write_text", fill_up)
        write_bundle(tmp_path / "b", toy_model.manifest(), PROGRAMS)
    assert names_beside(tmp_path / "b") == []


def test_only_a_bundle_is_overwritten_and_only_when_asked(bundle: Path, tmp_path: Path) -> None:
    other = PROGRAMS | {"head.pte": b"new"}
    with pytest.raises(OutputError, match="exists already"):
        write_bundle(bundle, toy_model.manifest(), other)
    assert open_bundle(bundle).path("head.pte").read_bytes() == PROGRAMS["head.pte"]
    write_bundle(bundle, toy_model.manifest(), other, overwrite=True)
    assert open_bundle(bundle).path("head.pte").read_bytes() == b"new"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(OutputError, match="did not write"):
        write_bundle(tmp_path / "thesis", toy_model.manifest(), PROGRAMS, overwrite=True)
    assert names_beside(bundle) == ["bundle", "thesis"]
    assert (tmp_path / "thesis/chapter.txt").exists()


def test_a_failed_overwrite_keeps_the_old_bundle(bundle: Path) -> None:
    with pytest.raises(BundleError):
        write_bundle(bundle, toy_model.manifest(), {"layers.pte": b"x"}, overwrite=True)
    assert open_bundle(bundle).verified


def test_a_writer_refuses_names_that_lead_out(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="plain relative path"):
        BundleWriter(tmp_path).path("../x")
