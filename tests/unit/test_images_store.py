"""Images in a store: ids, what is listed, what is refused, what is left."""

import dataclasses
from pathlib import Path

import pytest

from forkypig.errors import InvalidRequest, NotFound
from forkypig.images.manifest import FILES, FileEntry, Manifest, hash_file, read_manifest
from forkypig.images.store import BUILDING, ImageStore
from forkypig.model import Image, ImageId


def publish(store: ImageStore, name: str = "debian-12", created_us: int = 1) -> Image:
    directory = store.new_build()
    for file in FILES:
        (directory / file).write_bytes(f"{name} {file} {created_us}".encode())
    manifest = Manifest(
        name=name,
        description="",
        recipe="r",
        disk_format="raw",
        cmdline="console=ttyS0",
        kernel_release="6.1",
        stored_bytes=10,
        created_us=created_us,
        files={
            file: FileEntry(size_bytes=(directory / file).stat().st_size, sha256=hash_file(directory / file))
            for file in FILES
        },
        packages=("python3=3.11",),
    )
    return store.publish(directory, manifest)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def test_a_store_that_was_never_used_is_empty(store: ImageStore) -> None:
    assert store.list() == []
    assert not store.root.exists()
    with pytest.raises(NotFound, match="image build"):
        store.get("debian-12")


def test_a_published_image_is_found_by_id_and_by_name_and_reads_back_the_same(store: ImageStore) -> None:
    image = publish(store)
    assert store.list() == [image]
    assert store.get(image.id) == store.get("debian-12") == image
    assert image.id == f"i-{image.sha256[:12]}"
    manifest = read_manifest(store.root / image.id)
    assert manifest.image() == image
    assert manifest.packages == ("python3=3.11",)


def test_the_id_depends_on_all_that_the_manifest_says(store: ImageStore) -> None:
    manifest = read_manifest(store.root / publish(store).id)
    entry = dataclasses.replace(manifest.files["initrd"], sha256="0" * 64)
    others = [
        dataclasses.replace(manifest, name="other"),
        dataclasses.replace(manifest, recipe="other"),
        dataclasses.replace(manifest, cmdline="console=ttyS0 quiet"),
        dataclasses.replace(manifest, kernel_release="6.2"),
        dataclasses.replace(manifest, created_us=2),
        dataclasses.replace(manifest, files={**manifest.files, "initrd": entry}),
        dataclasses.replace(manifest, packages=("python3=3.12",)),
    ]
    assert len({other.image_id for other in others} | {manifest.image_id}) == len(others) + 1


def test_a_name_means_its_newest_image(store: ImageStore) -> None:
    new = publish(store, created_us=20)
    old = publish(store, created_us=10)
    assert store.list() == [old, new]
    assert store.get("debian-12") == new


def test_files_lie_below_the_image(store: ImageStore) -> None:
    image = publish(store)
    files = store.files(image.id)
    assert files.disk_format == "raw"
    assert {files.disk.parent, files.kernel.parent, files.initrd.parent} == {store.root / image.id}
    assert files.disk.is_file()
    assert files.kernel.is_file()
    assert files.initrd.is_file()
    assert files.cmdline == "console=ttyS0"


def test_half_made_directories_are_no_images_and_go_with_the_left_overs(store: ImageStore) -> None:
    image = publish(store)
    half = store.new_build()
    (half / "root").mkdir()
    (store.root / "i-0123456789ab").mkdir()  # a manifest is missing
    assert store.list() == [image]
    store.remove_leftovers()
    assert not [path for path in store.root.iterdir() if path.name.startswith(BUILDING)]
    assert store.list() == [image]


def test_a_manifest_in_the_wrong_directory_is_no_image(store: ImageStore) -> None:
    image = publish(store)
    (store.root / image.id).rename(store.root / "i-0123456789ab")
    assert store.list() == []
    with pytest.raises(InvalidRequest, match="damaged"):
        store.get("i-0123456789ab")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 9}', b'{"format": 1, "files": 3}', b"\xff"])
async def test_a_damaged_manifest_is_said_to_be_so_and_can_be_removed(store: ImageStore, content: bytes) -> None:
    image = publish(store)
    (store.root / image.id / "manifest.json").write_bytes(content)
    assert store.list() == []
    with pytest.raises(InvalidRequest, match="damaged"):
        store.files(image.id)
    store.remove(image.id)
    with pytest.raises(NotFound):
        store.files(image.id)


@pytest.mark.parametrize("file", FILES)
async def test_verify_names_the_file_that_changed(store: ImageStore, file: str) -> None:
    image = publish(store)
    await store.verify(image.id)
    path = store.root / image.id / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    store.check_sizes(image.id)  # it only looks at sizes
    with pytest.raises(InvalidRequest, match=f"{file} of image {image.id} is damaged: its content"):
        await store.verify(image.id)
    path.write_bytes(content + b"!")
    with pytest.raises(InvalidRequest, match=f"{file}.*was built with {len(content)}"):
        store.check_sizes(image.id)
    path.unlink()
    with pytest.raises(InvalidRequest, match=f"{file}.*missing"):
        await store.verify(image.id)


def test_remove_takes_one_image_and_leaves_the_others(store: ImageStore) -> None:
    gone, kept = publish(store, created_us=1), publish(store, "other", 2)
    store.remove(gone.id)
    assert [path.name for path in store.root.iterdir()] == [kept.id]
    with pytest.raises(NotFound):
        store.remove(gone.id)


@pytest.mark.parametrize("ref", ["../x", "i-../../x", ".building-1", "", "i-0123456789AB"])
def test_only_ids_reach_a_path(store: ImageStore, ref: str) -> None:
    publish(store)
    with pytest.raises(NotFound):
        store.remove(ImageId(ref))
    with pytest.raises(NotFound):
        store.files(ImageId(ref))
