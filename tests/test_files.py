"""Files are complete or not there, whatever happens while they are written."""

import os
import stat

import pytest

from timm_qkformer.files import refuse_existing, replacing, write_atomically


def test_replaces_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("before", [[], [b"old"]])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_things_as_they_were(tmp_path, error, before):
    for content in before:
        (tmp_path / "file").write_bytes(content)

    def write():
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == before


def test_text_is_utf8(tmp_path):
    write_atomically(tmp_path / "page.md", "½ τ\n")
    assert (tmp_path / "page.md").read_bytes() == "½ τ\n".encode()


def test_existing_files_are_named(tmp_path):
    names = [tmp_path / f"{i}.png" for i in range(5)]
    refuse_existing(*names)
    for name in names[1:]:
        name.touch()
    with pytest.raises(FileExistsError, match=r"1\.png.*2\.png.*3\.png and 1 more exist"):
        refuse_existing(*names)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "no", "x/.file.a1.tmp")])
def test_the_system_s_errors_name_the_file(tmp_path, error):
    with pytest.raises(type(error)) as raised, replacing(tmp_path / "file"):
        raise error
    assert raised.value.filename == str(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"nowhere/args\.yaml"):
        write_atomically(tmp_path / "nowhere" / "args.yaml", "a: 1")


def test_errors_of_another_file_keep_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "file"):
        (tmp_path / "other").read_bytes()
