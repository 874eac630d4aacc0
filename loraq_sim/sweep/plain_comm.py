"""Connections to a Dask scheduler that carry data and nothing that would run.

Dask unpickles what a scheduler sends (exceptions, warnings, types), so whoever answers at its
address could run code here. These connections decode MessagePack alone: texts, numbers, lists,
mappings. A pickle, or bytes of any kind, arrives as `NOT_LOADED`. What is sent is as in Dask.

Source: the frames are those of ``distributed.protocol.utils.pack_frames_prelude``.
"""

import struct
from functools import cache
from typing import Any

__all__ = ["NOT_LOADED", "plain_address", "plain_data"]

NOT_LOADED = "not loaded: bytes or a pickle from the scheduler"
"""What stands in a message for anything that is not plain data."""

MAX_MESSAGE_BYTES = 256 * 2**20
# Scheme of the connection that decodes plain data, by the scheme people write.
_SCHEMES = {"tcp": "plain+tcp", "tls": "plain+tls"}


def plain_address(address: str) -> str:
    """The address at which a Dask client connects as described above: ``plain+tcp://host:port``."""
    _register()
    scheme, _, location = address.partition("://")
    return f"{_SCHEMES[scheme]}://{location}"


def plain_data(frame: bytes) -> Any:
    """The message of a first frame; bytes and pickles in it are replaced by `NOT_LOADED`.

    Raises
    ------
    ValueError
        If the frame is no MessagePack.
    """
    import msgpack

    try:
        content = msgpack.unpackb(
            frame, object_hook=_plain_mapping, use_list=False, strict_map_key=False, raw=False
        )
    except ValueError:
        raise
    except Exception as error:  # of msgpack, and what a key that cannot be hashed raises
        raise ValueError(f"no message: {type(error).__name__}: {error}") from None
    return _without_bytes(content)


def _plain_mapping(mapping: dict) -> Any:
    if "__Set__" in mapping:
        return set(mapping["as-list"])
    if "__Enum__" in mapping:
        return mapping["name"]
    if "__Serialized__" in mapping or "__Pickled__" in mapping:
        return NOT_LOADED
    return mapping


def _without_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_bytes(key): _without_bytes(entry) for key, entry in value.items()}
    if isinstance(value, tuple | set):
        return type(value)(_without_bytes(entry) for entry in value)
    return value if isinstance(value, str | int | float | bool | None) else NOT_LOADED


async def _first_frame(stream: Any) -> bytes:
    """The frame that holds a message; frames after it hold arrays and pickles."""
    (size,) = struct.unpack("Q", await stream.read_bytes(8))
    if not 16 <= size <= MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes")
    packed = await stream.read_bytes(size)
    (count,) = struct.unpack_from("Q", packed)
    if not 1 <= count <= size // 8 - 1:
        raise ValueError(f"a message of {count} frames")
    lengths = struct.unpack_from(f"{count}Q", packed, 8)
    start = 8 * (1 + count)
    # Frames beyond the packed ones follow on the stream.
    left = sum(lengths) - (size - start)
    if not 0 <= left <= MAX_MESSAGE_BYTES or start + lengths[0] > size:
        raise ValueError("a message whose lengths do not fit")
    if left:
        await stream.read_bytes(left)
    return packed[start : start + lengths[0]]


@cache
def _register() -> None:
    """Teach Dask the schemes of `_SCHEMES`: its own connections, but for how a message is read."""
    from distributed.comm import CommClosedError, tcp
    from distributed.comm.registry import backends
    from tornado.iostream import StreamClosedError

    class PlainReads:
        async def read(self, deserializers: object = None) -> Any:
            del deserializers
            if self.stream is None:
                raise CommClosedError
            try:
                return plain_data(await _first_frame(self.stream))
            except (StreamClosedError, OSError) as error:
                self.stream = None
                self._closed = True
                raise CommClosedError(f"in {self}: {error}") from error
            except ValueError as error:
                self.abort()
                raise CommClosedError(f"in {self}: {error}") from error
            except BaseException:
                # What was read of the message is not known, so nothing after it can be read.
                self.abort()
                raise

    for name, scheme in _SCHEMES.items():
        kind = name.upper()
        comm = type(f"Plain{kind}", (PlainReads, getattr(tcp, kind)), {})
        connector = type(
            f"Plain{kind}Connector",
            (getattr(tcp, f"{kind}Connector"),),
            {"prefix": f"{scheme}://", "comm_class": comm},
        )
        backend = type(
            f"Plain{kind}Backend",
            (getattr(tcp, f"{kind}Backend"),),
            {"_connector_class": connector},
        )
        backends[scheme] = backend()
