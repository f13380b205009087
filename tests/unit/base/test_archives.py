"""Archives that promise more than they hold are refused before memory is taken."""

import io
import resource
import zipfile

import numpy as np
import pytest

from qdm_lightning.base import archives
from qdm_lightning.base.archives import array_headers, check_sizes
from qdm_lightning.base.files import reading


def npz(**arrays) -> io.BytesIO:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    stream.seek(0)
    return stream


def test_headers_are_those_of_numpy():
    arrays = {
        "a": np.zeros((3, 4), np.uint8),
        "b": np.zeros((2, 0, 5)),
        "text": np.array("four"),
        "fortran": np.asfortranarray(np.ones((2, 3), np.float16)),
        "flag": np.array([True]),
        "big": np.ones(3, ">i4"),
    }
    headers = array_headers(npz(**arrays))
    assert {name: (header.shape, header.nbytes) for name, header in headers.items()} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }
    assert headers["a"].kind == "u1"


def test_anything_else_passes_and_the_stream_is_at_its_beginning():
    for stream in (npz(a=np.ones(2)), io.BytesIO(b"no archive"), io.BytesIO()):
        check_sizes(stream)
        assert stream.tell() == 0


def header_bomb() -> bytes:
    """8 TB by its header, in a few bytes."""
    stream, array = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (2**43,)})
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("images.npy", array.getvalue())
    return stream.getvalue()


def zeros_bomb(count: int) -> bytes:
    """Bytes that are zero, and an honest header."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (count,)})
        for _ in range(count >> 20):
            array.write(bytes(1 << 20))
    return stream.getvalue()


@pytest.mark.parametrize(("kind", "message"), [("header", "promises 8,796,093,022,208 bytes"), ("zeros", "would unpack to")])
def test_a_bomb_takes_no_memory(tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(archives, "SMALL", 2**20)
    (tmp_path / "a.npz").write_bytes(header_bomb() if kind == "header" else zeros_bomb(2**26))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"a\.npz is damaged: .*{message}"), reading(tmp_path / "a.npz"):
        pytest.fail("it would have been read")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB


def test_arrays_of_objects_are_refused():
    stream = io.BytesIO()
    np.savez(stream, a=np.array([{}], dtype=object))
    stream.seek(0)
    with pytest.raises(ValueError, match="a is no array of numbers or text"):
        check_sizes(stream)
