"""The manifest: canonical bytes, and a clear refusal of every key with a wrong type or range."""

from __future__ import annotations

import json

import pytest
from salr.formats.errors import FormatError, VersionError
from salr.formats.manifest import canonical_json, is_adapter_name, parse_manifest
from salr.formats.reader import SalrFile

Q, UP = "layers.0.attn.q", "layers.0.mlp.up"
HUGE = 10**400


@pytest.fixture
def value(draft):
    return draft.manifest


def put(value: dict, path: str, new: object) -> None:
    """Set ``a/b/0`` in nested JSON; ``new`` of Ellipsis removes the key."""
    *parents, last = path.split("/")
    for key in parents:
        value = value[int(key) if isinstance(value, list) else key]
    if new is ...:
        del value[last]
    else:
        value[int(last) if isinstance(value, list) else last] = new


def parse(value: object):
    return parse_manifest(json.dumps(value).encode(), "f.salr")


def test_the_golden_manifest_is_canonical_and_survives_parsing(golden):
    data = bytes(SalrFile(golden).raw("salr.manifest"))
    assert parse_manifest(data, "f").to_json() == data == canonical_json(json.loads(data))


def test_canonical_json_sorts_keys_uses_no_space_and_shortest_floats():
    assert canonical_json({"b": 0.1, "a": [1, "ö"]}) == '{"a":[1,"ö"],"b":0.1}'.encode()


def test_canonical_json_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


def test_unknown_keys_are_ignored(value):
    expected = parse(value)
    value["later"] = {"x": 1}
    value["modules"][Q]["later"] = [1]
    value["modules"][Q]["adapters"][0]["later"] = None
    value["ledger"][0]["later"] = 0
    assert parse(value) == expected


def test_a_required_feature_that_is_unknown_is_refused_by_name(value):
    value["required_features"] = ["entropy_coding"]
    with pytest.raises(VersionError, match=r"f.salr: the file requires feature entropy_coding; upgrade salr"):
        parse(value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"nul", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"])
def test_what_is_not_json_is_refused(data):
    with pytest.raises(FormatError, match=r"f.salr: the manifest is not JSON"):
        parse_manifest(data, "f.salr")


@pytest.mark.parametrize("top", [[], None, 1, "text"])
def test_what_is_no_object_is_refused(top):
    with pytest.raises(FormatError, match=r"f.salr: manifest .* needed an object"):
        parse(top)


WRONG = [
    ("generator", ..., "generator"), ("generator", 1, "generator"),
    ("modules", ..., "modules"), ("modules", [], "modules"), (f"modules/{Q}", 3, Q), (f"modules/{Q}", None, Q),
    ("checksums", ..., "checksums"), ("checksums", [], "checksums"),
    ("ledger", {}, "ledger"), ("ledger/0", "line", "ledger"), ("ledger/0/fate", "eaten", "fate"),
    ("ledger/0/key", 1, "key"), ("ledger/0/reason", ..., "reason"), ("ledger/0/file", None, "file"),
    ("options", None, "options"), ("source", "here", "source"), ("environment", 1, "environment"),
    ("required_features", "none", "required_features"), ("required_features", ..., "required_features"),
    (f"modules/{Q}/shape", [], "shape"), (f"modules/{Q}/shape", [5], "shape"),
    (f"modules/{Q}/shape", [1, 1, 5, 9], "shape"),
    (f"modules/{Q}/shape", [0, 9], "shape"), (f"modules/{Q}/shape", [-5, 9], "shape"),
    (f"modules/{Q}/shape", [5.0, 9], "shape"), (f"modules/{Q}/shape", [True, 9], "shape"),
    (f"modules/{Q}/shape", "59", "shape"), (f"modules/{Q}/source_shape", None, "source_shape"),
    (f"modules/{Q}/source_shape", [5, 8], "source_shape"), (f"modules/{Q}/source_shape", [9, 5], "source_shape"),
    (f"modules/{Q}/transposed", True, "source_shape"),
    (f"modules/{Q}/nnz", -1, "nnz"), (f"modules/{Q}/nnz", 1.0, "nnz"), (f"modules/{Q}/nnz", True, "nnz"),
    (f"modules/{Q}/nnz", HUGE, "nnz"), (f"modules/{Q}/pattern", "4:8", "pattern"),
    (f"modules/{Q}/pattern", ["dense"], "pattern"),
    (f"modules/{Q}/encoding", "fp8", "encoding"), (f"modules/{Q}/encoding", None, "encoding"),
    (f"modules/{Q}/values_from", "nowhere", "values_from"), (f"modules/{Q}/dtype", 16, "dtype"),
    (f"modules/{Q}/dtype", "BF17", "dtype"), (f"modules/{Q}/source_tensor", None, "source_tensor"),
    (f"modules/{Q}/transposed", 0, "transposed"), (f"modules/{Q}/group_size", 4, "group_size"),
    (f"modules/{UP}/group_size", None, "group_size"), (f"modules/{UP}/group_size", 0, "group_size"),
    (f"modules/{UP}/group_size", -4, "group_size"), (f"modules/{UP}/group_size", 4.0, "group_size"),
    (f"modules/{Q}/error", None, "error"), (f"modules/{Q}/error/mask", ..., "mask"),
    (f"modules/{Q}/error/energy", "much", "energy"), (f"modules/{Q}/error/bound", float("nan"), "bound"),
    (f"modules/{Q}/error/residual", float("inf"), "residual"), (f"modules/{Q}/error/mask", HUGE, "mask"),
    (f"modules/{Q}/adapters", {}, "adapters"), (f"modules/{Q}/adapters/0", "residual", "adapters[0]"),
    (f"modules/{Q}/adapters/1/rank", 0, "rank"), (f"modules/{Q}/adapters/1/rank", 1.0, "rank"),
    (f"modules/{Q}/adapters/1/scaling", "1", "scaling"), (f"modules/{Q}/adapters/1/scaling", float("-inf"), "scaling"),
    (f"modules/{Q}/adapters/1/scaling", HUGE, "scaling"), (f"modules/{Q}/adapters/1/alpha", "x", "alpha"),
    (f"modules/{Q}/adapters/1/origin", None, "origin"), (f"modules/{Q}/adapters/1/converted", 1, "converted"),
    (f"modules/{Q}/adapters/1/name", "residual", "adapters"), (f"modules/{Q}/adapters/1/name", 1, "name"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "new", "key"), WRONG, ids=[f"{path}={str(new)[:12]}" for path, new, _ in WRONG])
def test_a_key_of_a_wrong_type_or_range_is_named_with_what_was_needed(value, path, new, key):
    put(value, path, new)
    with pytest.raises(FormatError) as error:
        parse(value)
    message = str(error.value)
    assert message.startswith("f.salr: manifest ") and key in message and "needed " in message and len(message) < 600


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "../a", "a b", "ä", "a\n", "a:b", "a*"])
def test_a_bad_adapter_name_is_refused(value, name):
    assert not is_adapter_name(name)
    value["modules"][Q]["adapters"][1]["name"] = name
    with pytest.raises(FormatError, match="letters, digits, '_' and '-' only"):
        parse(value)


@pytest.mark.parametrize("name", ["a", "residual", "my-lora_2", "0", "A" * 200])
def test_a_good_adapter_name_is_one(name):
    assert is_adapter_name(name)


def test_an_integer_may_stand_for_a_float(value):
    value["modules"][Q]["adapters"][1]["scaling"] = 2
    scaling = parse(value).modules[Q].adapters[1].scaling
    assert scaling == 2.0 and type(scaling) is float


@pytest.mark.parametrize("key", ["alpha", "converted"])
def test_an_absent_optional_key_is_none(value, key):
    del value["modules"][Q]["adapters"][1][key]
    assert getattr(parse(value).modules[Q].adapters[1], key) is None


def test_two_modules_of_one_source_tensor_are_refused(value):
    value["modules"][UP]["source_tensor"] = value["modules"][Q]["source_tensor"]
    with pytest.raises(FormatError, match=r"f.salr: .*source_tensor"):
        parse(value)


@pytest.mark.parametrize("output", [0.125, None])
def test_an_output_error_comes_back_and_an_absent_one_leaves_no_key(value, output):
    value["modules"][Q]["error"]["output"] = output
    manifest = parse(value)
    assert manifest.modules[Q].error.output == output
    written = json.loads(manifest.to_json())["modules"][Q]["error"]
    assert written.get("output") == output and ("output" in written) == (output is not None)
    assert parse_manifest(manifest.to_json(), "f") == manifest


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(FormatError, match="an object holds a key twice"):
        parse_manifest(b'{"generator":"a","generator":"b"}', "x.salr")
