"""Who a page belongs to: the identity of a namespace, its header on disk, and the keys of pages."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from symphony_sglang.errors import StoreError, StoreIdentityError, StoreKeyError

KEY_BYTES = 32
FORMAT_VERSION = 1
STORE_MAGIC = "symphony-page-store"
STORE_HEADER = "store.json"
NAMESPACE_HEADER = "namespace.json"
NAMESPACE_PREFIX = "ns-"


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that decides whether two pages with equal keys hold equal bytes.

    Stores opened with namespaces that differ in any field share no page, no budget and no file.
    """

    model: str
    revision: str
    dtype: str
    layout: str
    page_tokens: int
    page_bytes: int  # largest payload of a page
    tp_rank: int = 0
    tp_size: int = 1
    hash_scheme: str = "sha256-chain"
    extra: tuple[tuple[str, str], ...] = ()  # further facts of the pool: layers, heads, salt

    def __post_init__(self) -> None:
        for name in ("page_tokens", "page_bytes", "tp_size"):
            if getattr(self, name) < 1:
                raise StoreError(f"namespace {name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.tp_rank < self.tp_size:
            raise StoreError(
                f"namespace tp_rank is {self.tp_rank}; expected 0 to {self.tp_size - 1}"
            )

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON; its first 16 bytes stand in every page header."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).digest()

    @property
    def folder(self) -> str:
        return NAMESPACE_PREFIX + self.digest.hex()[:16]

    def describe(self) -> str:
        return (
            f"{self.model} ({self.dtype}, {self.layout}, {self.page_tokens} tokens a page, "
            f"rank {self.tp_rank} of {self.tp_size})"
        )


class StoreHeader(msgspec.Struct, frozen=True):
    """``store.json``: says that a directory is a page store, and of which format."""

    magic: str
    version: int


class NamespaceHeader(msgspec.Struct, frozen=True):
    """``namespace.json``: identity, geometry, and an epoch that grows when all is cleared."""

    namespace: Namespace
    slot_bytes: int
    segment_bytes: int
    epoch: int
    checksum: int = 0

    @property
    def slots_per_segment(self) -> int:
        return self.segment_bytes // self.slot_bytes

    def sealed(self) -> NamespaceHeader:
        body = msgspec.json.encode(msgspec.structs.replace(self, checksum=0), order="sorted")
        return msgspec.structs.replace(self, checksum=xxhash.xxh3_64_intdigest(body) >> 1)


def key_from_hex(text: str) -> bytes:
    """A 64-digit hexadecimal digest as 32 bytes; anything else is a ``StoreKeyError``."""
    return keys_from_hex([text])[0]


def keys_from_hex(texts: Sequence[str]) -> list[bytes]:
    """The digests of a batch as bytes; the first text that is not one is named in the error."""
    raw = joined_from_hex(texts)
    return [raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES)]


def joined_from_hex(texts: Sequence[str]) -> bytes:
    """As ``keys_from_hex``, the keys one after the other."""
    try:
        raw = bytes.fromhex("".join(texts))
    except (TypeError, ValueError):
        raw = b""
    # fromhex skips blanks, so the total is compared as well as each length.
    if len(raw) != KEY_BYTES * len(texts) or not {*map(len, texts)} <= {2 * KEY_BYTES}:
        raise StoreKeyError(f"page key {first_bad_text(texts)!r:.80} is not 64 hexadecimal digits")
    return raw


def first_bad_text(texts: Sequence[object]) -> object:
    digits = frozenset("0123456789abcdefABCDEF")
    for text in texts:
        if not isinstance(text, str) or len(text) != 2 * KEY_BYTES or not digits.issuperset(text):
            return text
    return texts


def check_keys(keys: Sequence[bytes]) -> None:
    """Refuse what is not a 32-byte digest before it can name anything."""
    if {*map(type, keys)} <= {bytes} and {*map(len, keys)} <= {KEY_BYTES}:
        return
    for key in keys:
        if type(key) is not bytes or len(key) != KEY_BYTES:
            raise StoreKeyError(f"page key {key!r:.80} is not {KEY_BYTES} bytes")


def write_file_atomic(path: Path, body: bytes) -> None:
    """Replace `path` so that a crash leaves the old content or the new, never a mixture."""
    # Ranks of one worker start together and write the same header: each its own temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(handle, body)
        os.fsync(handle)
    finally:
        os.close(handle)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names created or removed in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prepare_directory(directory: Path) -> None:
    """Create `directory` with its header, or check that the header there is ours."""
    path = directory / STORE_HEADER
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            header = StoreHeader(STORE_MAGIC, FORMAT_VERSION)
            write_file_atomic(path, msgspec.json.encode(header))
            return
        body = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{directory}: cannot hold a page store: {error.strerror}") from error
    try:
        found = msgspec.json.decode(body, type=StoreHeader)
    except msgspec.DecodeError as error:
        raise StoreIdentityError(f"{path}: not the header of a page store: {error}") from error
    if found.magic != STORE_MAGIC or found.version != FORMAT_VERSION:
        raise StoreIdentityError(
            f"{path}: says {found.magic!r} version {found.version}; "
            f"expected {STORE_MAGIC!r} version {FORMAT_VERSION}"
        )


def read_namespace_header(folder: Path) -> NamespaceHeader | None:
    """The header in `folder`, None where there is none.

    Raises:
        StoreIdentityError: the header is damaged, or belongs to another folder.
    """
    path = folder / NAMESPACE_HEADER
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = msgspec.json.decode(body, type=NamespaceHeader)
    except (msgspec.DecodeError, StoreError) as error:
        raise StoreIdentityError(f"{path}: damaged: {error}") from error
    if header.sealed().checksum != header.checksum or header.namespace.folder != folder.name:
        raise StoreIdentityError(
            f"{path}: damaged or moved: it describes {header.namespace.folder}, "
            f"found in {folder.name}"
        )
    return header


def write_namespace_header(folder: Path, header: NamespaceHeader) -> None:
    body = msgspec.json.format(msgspec.json.encode(header.sealed(), order="sorted"), indent=2)
    write_file_atomic(folder / NAMESPACE_HEADER, body)


def namespace_folders(directory: Path) -> list[Path]:
    """The folders of all namespaces in a store directory, by name."""
    return sorted(
        path
        for path in directory.glob(NAMESPACE_PREFIX + "*")
        if (path / NAMESPACE_HEADER).is_file()
    )
