"""Strategies: JSON bodies that nearly make sense, protobuf messages at their edges, plain bytes."""

import json
import math
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from semipd_server.openai.schema import INERT, ChatRequest, CompletionRequest

_leaf = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
)
any_json = st.recursive(
    _leaf,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
_likely = st.sampled_from(
    [1, 2, 0, -1, 0.5, True, "x", ["x"], [1], [[1]], {"5": 1.0}, {"include_usage": True}, None]
)
_names = sorted({*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__, *INERT})
_plain_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "assistant", "x"]), "content": st.text(max_size=20)}
)
_odd_message = st.fixed_dictionaries(
    {"role": _leaf, "content": any_json | st.lists(st.fixed_dictionaries({"type": _leaf}))},
    optional={"name": _leaf, "refusal": _leaf, "tool_calls": any_json, "odd": _leaf},
)
_message = st.one_of(_plain_message, _plain_message, _plain_message, _odd_message)
_ids = st.lists(st.integers(2, 300), min_size=1, max_size=5)
_few = st.sampled_from([1, 2])
BODIES: Final = {
    "/v1/completions": st.fixed_dictionaries(
        {"max_tokens": _few, "prompt": st.text(min_size=1, max_size=30) | _ids}
    ),
    "/v1/chat/completions": st.fixed_dictionaries(
        {"max_tokens": _few, "messages": st.lists(_message, min_size=1, max_size=3)}
    ),
    "/tokenize": st.fixed_dictionaries({"prompt": st.text(max_size=30)}),
    "/detokenize": st.fixed_dictionaries({"tokens": _ids}),
}
"""What each route takes."""

_odd = st.dictionaries(st.sampled_from(_names), _likely | any_json, max_size=2)


def body(route: str) -> st.SearchStrategy[Any]:
    """A request that a route takes, with a field or two that are strange."""
    plain = BODIES.get(route, BODIES["/v1/completions"])
    return st.one_of(
        plain,
        st.tuples(plain, _odd).map(lambda parts: parts[1] | parts[0]),
        st.tuples(plain, _odd).map(lambda parts: parts[0] | parts[1]),
    )


_HOSTILE_TEXTS: Final = (
    *(b"", b"{", b"[" * 5000, b'{"prompt": ', b'{"prompt": "\\ud800", "max_tokens": 1}'),
    *(b'{"max_tokens": 1e999}', b'{"max_tokens": NaN}', b'{"prompt": "\xff"}', b"\x00" * 64),
    b'{"max_tokens": ' + b"9" * 4000 + b"}",
    b'{"prompt": "x", "prompt": "y", "max_tokens": 1}',
)


def json_bytes(route: str) -> st.SearchStrategy[bytes]:
    """What is posted to a route that takes JSON."""
    texts = body(route).map(lambda value: json.dumps(value).encode())
    return st.one_of(
        texts,
        texts,
        any_json.map(lambda value: json.dumps(value).encode()),
        damaged(texts),
        st.sampled_from(_HOSTILE_TEXTS),
        st.binary(max_size=200),
    )


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Cut short, and with a byte or two that are others."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 2))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


_HEADER_NAMES: Final = (
    *(b"x-request-id", b"authorization", b"traceparent", b"tracestate", b"accept", b"cookie"),
    *(b"content-type", b"content-encoding", b"accept-encoding", b"expect", b"origin", b"upgrade"),
    *(b"x-forwarded-for", b"x-http-method-override", b"te", b"x-odd"),
)
_HEADER_TEXTS: Final = (
    *(
        b"",
        b"Bearer",
        b"Bearer x",
        b"bearer  \xff",
        b"application/json; charset=x",
        b"*/*",
        b"a" * 3000,
    ),
    *(
        b"00-" + b"1" * 32 + b"-" + b"1" * 16 + b"-01",
        b"00-zz",
        b"gzip",
        b"application/openmetrics-text",
    ),
)


def headers() -> st.SearchStrategy[dict[bytes, bytes]]:
    """Of HTTP; most requests have none that are odd."""
    visible = st.binary(max_size=20).map(
        lambda value: bytes(b for b in value if b > 32 and b != 127)
    )
    odd = st.dictionaries(
        st.sampled_from(_HEADER_NAMES), st.sampled_from(_HEADER_TEXTS) | visible, max_size=3
    )
    return st.just({}) | odd


def metadata() -> st.SearchStrategy[tuple[tuple[str, str | bytes], ...]]:
    """Of gRPC, which names what is not text by its ending."""
    names = ("x-request-id", "authorization", "traceparent", "tracestate", "x-odd")
    texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
    pair = st.tuples(st.sampled_from(names), texts)
    odd = st.tuples(st.just("x-odd-bin"), st.binary(max_size=20))
    return st.just(()) | st.lists(pair | odd, max_size=3).map(tuple)


_INTS: Final = (
    0,
    1,
    2,
    16,
    17,
    20,
    21,
    64,
    65,
    2**31 - 1,
    2**32 - 1,
    -1,
    -(2**31),
    2**63,
    2**64 - 1,
)
_FLOATS: Final = (0.0, -0.0, 1.0, 0.5, -1.0, 2.0, 1e-30, 3e38, math.inf, -math.inf, math.nan)
_TEXTS: Final = ("", "x", "def main():", "\0", "é" * 40, "🌍", "a" * 3000, "user", "{{ 7*7 }}")
_SCALARS: Final = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_FLOAT: st.one_of(
        st.floats(0, 1, width=32), st.sampled_from(_FLOATS), st.floats(width=32)
    ),
    FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from(_FLOATS) | st.floats(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 4),
}
_RANGES: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_MAX_ENTRIES: Final = 320  # more than any bound of a list, fewer than a model's length
_SMALL: Final = {"max_tokens": st.integers(1, 3)}
"""Fields that would make every request a long one."""
_ALWAYS: Final = ("sampling", "sampling_params", "prompt", "input")
"""Without these, a request is refused before anything else is looked at."""


def message_bytes(kind: Descriptor) -> st.SearchStrategy[bytes]:
    """What is sent to an RPC that takes this message."""
    whole = message(kind).map(lambda found: found.SerializeToString())
    return st.one_of(whole, whole, damaged(whole), st.binary(max_size=100))


@st.composite
def message(draw: st.DrawFn, kind: Descriptor) -> Any:
    """A few of its fields set, or many, to values at the edges of their types and of what is
    allowed; of alternatives, one."""
    found = GetMessageClass(kind)()
    rarity = draw(st.sampled_from((60, 20, 3)))
    alternatives = [oneof for oneof in kind.oneofs if len(oneof.fields) > 1]
    for oneof in alternatives:
        if oneof.name in _ALWAYS or draw(st.integers(1, rarity)) == 1:
            _set(draw, found, draw(st.sampled_from(list(oneof.fields))))
    for field in kind.fields:
        if field.containing_oneof in alternatives:
            continue
        if field.name in _SMALL:
            setattr(found, field.name, draw(_SMALL[field.name]))
        elif field.name in _ALWAYS or draw(st.integers(1, rarity)) == 1:
            _set(draw, found, field)
    return found


def _set(draw: st.DrawFn, found: Any, field: FieldDescriptor) -> None:
    target: Any = getattr(found, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        for name in draw(st.lists(_scalar(key), max_size=4)):
            if value.message_type is not None:
                target[name].CopyFrom(draw(message(value.message_type)))
            else:
                target[name] = draw(_scalar(value))
    elif field.message_type is not None:
        many = draw(st.sampled_from((0, 1, 3))) if field.is_repeated else 1
        for part in (draw(message(field.message_type)) for _ in range(many)):
            target.append(part) if field.is_repeated else target.CopyFrom(part)
    elif field.is_repeated:
        values = draw(st.lists(_scalar(field), max_size=4))
        target.extend(values * draw(st.sampled_from((1, 1, 1, _MAX_ENTRIES // 4))))
    else:
        setattr(found, field.name, draw(_scalar(field)))


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.cpp_type in _RANGES:
        low, high = _RANGES[field.cpp_type]
        edges = st.sampled_from([i for i in _INTS if low <= i <= high])
        return st.one_of(st.integers(0, 400), st.integers(0, 400), edges)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        is_bytes = field.type == FieldDescriptor.TYPE_BYTES
        return st.binary(max_size=20) if is_bytes else st.sampled_from(_TEXTS) | st.text(max_size=9)
    return _SCALARS[field.cpp_type]
