"""Encrypted files: what comes out is what went in, and nothing that was changed comes out."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from luthier.encryption.chunks import CHUNK, TAG, SealedReader, SealedWriter
from luthier.encryption.keys import Keyring
from luthier.errors import CorruptFile

HEADER = 50
BIG = bytes(range(256)) * (3 * CHUNK // 256) + b"the end"


@pytest.fixture
def ring() -> Keyring:
    return Keyring("00" * 8, {"00" * 8: secrets.token_bytes(32)})


def write(path: Path, ring: Keyring, content: bytes, step: int = 1 << 20) -> Path:
    with path.open("wb") as file:
        writer = SealedWriter(file, ring)
        for start in range(0, len(content), step):
            writer.write(content[start : start + step])
        writer.finish()
    return path


def read(path: Path, ring: Keyring, start: int = 0, length: int | None = None) -> bytes:
    with SealedReader(path, ring) as reader:
        return b"".join(reader.pieces(start, length))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, len(BIG)])
@pytest.mark.parametrize("step", [7919, CHUNK, 1 << 20])
def test_content_comes_back(tmp_path: Path, ring: Keyring, size: int, step: int) -> None:
    path = write(tmp_path / "file", ring, BIG[:size], step)
    assert read(path, ring) == BIG[:size]
    with SealedReader(path, ring) as reader:
        assert reader.size == size
    assert path.stat().st_size == HEADER + size + TAG * max(1, -(-size // CHUNK))


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 1), (5, 10), (CHUNK - 1, 2), (CHUNK, CHUNK), (CHUNK + 3, 2 * CHUNK), (len(BIG), 9),
     (len(BIG) - 2, 50)],
)  # fmt: skip
def test_any_part_of_it_is_read(tmp_path: Path, ring: Keyring, start: int, length: int) -> None:
    path = write(tmp_path / "file", ring, BIG)
    assert read(path, ring, start, length) == BIG[start : start + length]


def test_a_part_is_read_without_the_rest(tmp_path: Path, ring: Keyring) -> None:
    path = write(tmp_path / "file", ring, BIG)
    with SealedReader(path, ring) as reader:
        opened: list[int] = []
        chunk = reader._chunk
        reader._chunk = lambda number: opened.append(number) or chunk(number)  # type: ignore[method-assign,func-returns-value]
        assert len(b"".join(reader.pieces(CHUNK + 1, 10))) == 10
    assert opened == [1]


def test_nothing_of_it_is_readable_and_no_two_files_are_alike(
    tmp_path: Path, ring: Keyring
) -> None:
    content = b"canary" * 30_000
    one, two = (write(tmp_path / name, ring, content).read_bytes() for name in ("one", "two"))
    assert b"canary" not in one
    assert not {one[n : n + 16] for n in range(HEADER, len(one) - 16, 16)} & {
        two[n : n + 16] for n in range(HEADER, len(two) - 16, 16)
    }


def piece(number: int) -> slice:
    return slice(HEADER + number * (CHUNK + TAG), HEADER + (number + 1) * (CHUNK + TAG))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: piece(1).start],
        lambda data: data[: piece(3).start],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data + data[piece(0)],
        lambda data: data[: piece(0).start] + data[piece(1)] + data[piece(0)] + data[piece(2).start :],
        lambda data: data[: piece(1).start] + data[piece(2).start :],
        lambda data: data[: piece(1).start] + data[piece(0)] + data[piece(2).start :],
        lambda data: data[:HEADER],
        lambda data: data[:20],
        lambda data: b"",
    ],
    ids=["cut-to-1", "cut-to-3", "cut-byte", "longer", "more", "swapped", "left-out", "twice",
         "header-only", "half-header", "empty"],
)  # fmt: skip
def test_what_was_cut_moved_or_added_to_is_refused(
    tmp_path: Path, ring: Keyring, change: object
) -> None:
    path = write(tmp_path / "file", ring, BIG)
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CorruptFile):
        read(path, ring)


def test_each_changed_bit_is_found(tmp_path: Path, ring: Keyring) -> None:
    path = write(tmp_path / "file", ring, b"some rows")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptFile):
            read(path, ring)


def test_a_chunk_of_another_file_is_refused(tmp_path: Path, ring: Keyring) -> None:
    one, two = (write(tmp_path / name, ring, BIG) for name in ("one", "two"))
    data = bytearray(one.read_bytes())
    data[piece(1)] = two.read_bytes()[piece(1)]
    one.write_bytes(data)
    with pytest.raises(CorruptFile):
        read(one, ring)


def test_another_key_opens_nothing(tmp_path: Path, ring: Keyring) -> None:
    path = write(tmp_path / "file", ring, BIG)
    other = Keyring("00" * 8, {"00" * 8: secrets.token_bytes(32)})
    with pytest.raises(CorruptFile, match="does not open"):
        read(path, other)
    with pytest.raises(CorruptFile, match="no data key"):
        read(path, Keyring("11" * 8, {"11" * 8: secrets.token_bytes(32)}))


def test_no_nonce_comes_twice_under_a_key(
    tmp_path: Path, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[bytes, bytes]] = []

    class Watched:
        def __init__(self, key: bytes) -> None:
            self.key, self.real = key, AESGCM(key)

        def encrypt(self, nonce: bytes, data: bytes, more: bytes) -> bytes:
            used.append((self.key, nonce))
            return self.real.encrypt(nonce, data, more)

    monkeypatch.setattr(Keyring, "cipher", lambda self, *asked: Watched(self.derive(*asked)))
    for name in "abc":
        write(tmp_path / name, ring, BIG)
    assert len(used) == len(set(used)) == 12
    assert len({key for key, _ in used}) == 3
