"""Laws of formation/core that hold for any value."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import msgspec.inspect
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.clock import NS_PER_MS, hlc_at, hlc_ms, hlc_tick
from formation.core.codec import (
    Context,
    decode,
    encode,
    parse_signed,
    sign_value,
    signature_holds,
    verify_ed25519,
)
from formation.core.config import SETTINGS, default_values, load_file, merge_settings, settings_to_toml
from formation.core.errors import DecodeError, FormationError, UsageError
from formation.core.event import EVENT_BY_VERB, EVENT_TYPES, Event, event_body, parse_event
from formation.core.ids import (
    NetworkId,
    account_id_of,
    is_vm_id,
    node_id_of,
    pick_by_name_or_prefix,
    public_key_of_account,
    public_key_of_node,
    vm_id_of,
)
from formation.core.intent import Intent, parse_intent, sign_intent
from formation.core.keys import KeyPair, read_key_file, write_key_file
from formation.core.manifest import found_network, read_manifest
from formation.core.spec import Cordon, Desired, PortMap, Resources, Restart
from formation.core.units import GIB, KIB, MIB, format_duration, format_size, parse_duration_s, parse_size_bytes

NETWORK = NetworkId(b"\x11" * 32)
KEY = KeyPair(b"\x07" * 32)

# msgspec annotations are beyond hypothesis' own guesses: the base strategies say what a field may hold.
NUMBERS = st.integers(-(2**64), 2**64 - 1)
TEXTS = st.text(max_size=20)
st.register_type_strategy(
    PortMap, st.builds(PortMap, st.integers(1, 65535), st.sampled_from(["tcp", "udp"]), st.integers(0, 65535))
)
st.register_type_strategy(Resources, st.builds(Resources, vcpus=NUMBERS, memory_mib=NUMBERS, disk_gib=NUMBERS))
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "int": NUMBERS,
    "str": TEXTS,
    "bool": st.booleans(),
    "Resources": st.from_type(Resources),
    "Desired": st.sampled_from(Desired),
    "Restart": st.sampled_from(Restart),
    "Cordon": st.sampled_from(Cordon),
    "dict[str, str]": st.dictionaries(TEXTS, TEXTS, max_size=5),
    "tuple[str, ...]": st.lists(TEXTS, max_size=5).map(tuple),
    "tuple[PortMap, ...]": st.lists(st.from_type(PortMap), max_size=5).map(tuple),
    "tuple[tuple[int, str], ...]": st.lists(st.tuples(NUMBERS, TEXTS), max_size=5).map(tuple),
}


def annotation_of(cls: type[Event], field: str) -> str:
    found = (inspect.get_annotations(base) for base in cls.__mro__)
    return str(next(annotations[field] for annotations in found if field in annotations))


def values_of(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """What a field with limits may hold, up to a few times its least size."""
    match kind:
        case msgspec.inspect.IntType(ge=low, le=high):
            return st.integers(low, high)
        case msgspec.inspect.StrType(min_length=low, max_length=high):
            return st.text(min_size=low or 0, max_size=min(high or 20, 20))
        case msgspec.inspect.BytesType(min_length=low, max_length=high):
            return st.binary(min_size=low or 0, max_size=min(high or 64, 64))
        case msgspec.inspect.VarTupleType(item_type=item, min_length=low, max_length=high):
            return st.lists(values_of(item), min_size=low or 0, max_size=min(high or 3, 3)).map(tuple)
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, *(values_of(each.type) for each in fields))
    raise AssertionError(f"no strategy for {kind}")


def field_of(cls: type[Event], field: str) -> st.SearchStrategy[Any]:
    known = FIELDS.get(annotation_of(cls, field))
    if known is not None:
        return known
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType)
    return values_of(next(each.type for each in info.fields if each.name == field))


def events_of(cls: type[Event]) -> st.SearchStrategy[Event]:
    return st.builds(cls, **{field: field_of(cls, field) for field in cls.__struct_fields__})


BOUNDED = [(cls, each.name) for cls in EVENT_TYPES for each in msgspec.structs.fields(cls) if "Meta(" in str(each.type)]


@pytest.mark.parametrize(("cls", "field"), [(cls, name) for cls, name in BOUNDED])
def test_a_field_beyond_its_limit_is_refused(cls: type[Event], field: str) -> None:
    """What an event may carry is limited when it is parsed, so that nobody after needs to."""
    kind = next(each.type for each in msgspec.structs.fields(cls) if each.name == field)
    info = msgspec.inspect.type_info(kind)

    @settings(max_examples=5, deadline=None)
    @given(events_of(cls))
    def holds(event: Event) -> None:
        for value in beyond(info):
            plain = {**msgspec.to_builtins(event, builtin_types=(bytes,)), field: value}
            with pytest.raises(DecodeError, match=cls.verb.replace(".", "[.]")):
                parse_event(cls.verb, encode(plain))

    holds()


def beyond(info: msgspec.inspect.Type) -> list[Any]:
    """Values just outside a field's limits."""
    match info:
        case msgspec.inspect.IntType(ge=low, le=high):
            return [each for each in (None if low is None else low - 1, None if high is None else high + 1) if each is not None]
        case msgspec.inspect.StrType(max_length=int(high)):
            return ["x" * (high + 1)]
        case msgspec.inspect.BytesType(max_length=int(high)):
            return [bytes(high + 1)]
        case msgspec.inspect.VarTupleType(item_type=item, max_length=int(high)):
            return [[_least(item)] * (high + 1)]
        case msgspec.inspect.VarTupleType(item_type=item):
            return [[each] for each in beyond(item)]
    raise AssertionError(f"no limit in {info}")


def _least(info: msgspec.inspect.Type) -> Any:
    match info:
        case msgspec.inspect.StrType():
            return "x"
        case msgspec.inspect.BytesType(min_length=low):
            return bytes(low or 0)
        case msgspec.inspect.StructType(fields=fields):
            return [_least(each.type) for each in fields]
        case msgspec.inspect.VarTupleType(item_type=item, min_length=low):
            return [_least(item)] * (low or 0)
    raise AssertionError(f"no least value of {info}")


EVENTS = st.sampled_from(EVENT_TYPES).flatmap(events_of)
TIMES = st.integers(0, 2**48 - 1)
INTENTS = st.builds(
    Intent,
    account=st.binary(min_size=32, max_size=32),
    verb=TEXTS,
    object_id=TEXTS,
    body=st.binary(max_size=50),
    nonce=st.binary(min_size=16, max_size=16),
    created_ms=TIMES,
    expires_ms=TIMES,
    key=st.binary(min_size=32, max_size=32),
)


@pytest.mark.parametrize("cls", EVENT_TYPES)
def test_every_event_comes_back(cls: type[Event]) -> None:
    """parse_event(event_body(x)) == x for every type, and its bytes are the only ones."""

    @settings(max_examples=30, deadline=None)
    @given(events_of(cls))
    def holds(event: Event) -> None:
        body = event_body(event)
        assert parse_event(cls.verb, body) == event
        assert event_body(parse_event(cls.verb, body)) == body

    holds()


@settings(max_examples=100, deadline=None)
@given(INTENTS)
def test_every_intent_comes_back(intent: Intent) -> None:
    """parse_intent(sign_intent(x)) == x, with the same digest."""
    wish = sign_intent(KEY.sign, intent, network_id=NETWORK)
    assert parse_intent(wish.signed.raw) == wish
    assert parse_intent(wish.signed.raw).intent == intent


def only_decode_errors(data: bytes) -> None:
    """Whatever decodes was deterministic; whatever does not raises DecodeError."""
    for verb in EVENT_BY_VERB:
        try:
            assert event_body(parse_event(verb, data)) == data
        except DecodeError:
            pass
    try:
        assert parse_signed(data).raw == data
        assert parse_intent(data).signed.raw == data
    except DecodeError:
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_raise_decode_errors_only(data: bytes) -> None:
    """No bytes of a peer get another exception out of the decoders."""
    only_decode_errors(data)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | TEXTS | st.binary(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXTS | st.integers() | st.binary(max_size=3), inner, max_size=4)
        | st.builds(cbor2.CBORTag, st.sampled_from([0, 1, 2, 4, 5, 18, 28, 29, 30, 35, 36, 37, 258, 260, 43000, 55799]), inner)
    ),
    max_leaves=10,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(PLAIN)
def test_any_cbor_raises_decode_errors_only(value: object) -> None:
    """Well-formed CBOR of any shape, tags included, gets no other exception out of the decoders."""
    data = cbor2.dumps(value)
    only_decode_errors(data)
    try:
        parse_signed(cbor2.dumps(cbor2.CBORTag(18, value)))
    except DecodeError:
        pass


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Valid bytes with one byte changed, inserted or cut."""
    data = draw(valid)
    at = draw(st.integers(0, len(data) - 1))
    cut = draw(st.integers(0, 2))
    return data[:at] + draw(st.binary(min_size=0, max_size=2)) + data[at + cut :]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(mutated(EVENTS.map(event_body)))
def test_mutated_events_raise_decode_errors_only(data: bytes) -> None:
    """An event with a few bytes changed is another event or none."""
    only_decode_errors(data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(mutated(INTENTS.map(lambda intent: sign_intent(KEY.sign, intent, network_id=NETWORK).signed.raw)))
def test_mutated_intents_raise_decode_errors_only(data: bytes) -> None:
    """A signed intent with a few bytes changed is not one."""
    only_decode_errors(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=50), st.integers(0, 63), st.integers(1, 255))
def test_a_changed_signature_does_not_hold(payload: bytes, at: int, difference: int) -> None:
    """No byte of a signature is without meaning."""
    signed = sign_value(KEY.sign, Context.BLOCK, network_id=NETWORK, payload=payload)
    changed = bytearray(signed.signature)
    changed[at] ^= difference
    forged = sign_value(lambda _: bytes(changed), Context.BLOCK, network_id=NETWORK, payload=payload)
    assert signature_holds(verify_ed25519, KEY.public_key, signed, Context.BLOCK, network_id=NETWORK)
    assert not signature_holds(verify_ed25519, KEY.public_key, forged, Context.BLOCK, network_id=NETWORK)


@given(st.lists(st.integers(0, 10**19), min_size=1), TIMES)
def test_timestamps_only_grow(readings_ns: list[int], start_ms: int) -> None:
    """Whatever the wall clock reads, each timestamp is later than the last and not behind the wall."""
    last = hlc_at(start_ms * NS_PER_MS)
    for now_ns in readings_ns:
        tick = hlc_tick(last, now_ns)
        assert tick > last
        assert hlc_ms(tick) >= now_ns // NS_PER_MS
        last = tick


SETTING_VALUES = {
    str: st.text(max_size=20),
    int: st.integers(0, 2**40),
    list: st.lists(st.text(max_size=9), min_size=1, max_size=3),
}


@st.composite
def some_settings(draw: st.DrawFn, names: tuple[str, ...] = tuple(SETTINGS)) -> dict[str, Any]:
    chosen = draw(st.sets(st.sampled_from(names)))
    return {
        name: draw(st.sampled_from(SETTINGS[name].choices) if SETTINGS[name].choices else SETTING_VALUES[SETTINGS[name].kind])
        for name in sorted(chosen)
    }


WITH_VARIABLE = tuple(name for name, setting in SETTINGS.items() if setting.env)


@pytest.mark.slow
@given(some_settings(), some_settings(WITH_VARIABLE), some_settings())
def test_the_first_source_that_has_a_value_decides(flags: dict[str, Any], env: dict[str, Any], file: dict[str, Any]) -> None:
    """Flags before environment before file before default, for each setting by itself."""
    defaults = default_values({}, is_root=False)
    variables = {SETTINGS[name].env: value for name, value in env.items()}
    merged = merge_settings(flags=flags, env=variables, file=file, file_path="F", defaults=defaults)
    assert set(merged) == set(SETTINGS)
    for name, entry in merged.items():
        if name in flags:
            wanted = (flags[name], "flag")
        elif env.get(name):
            wanted = (env[name], f"env {SETTINGS[name].env}")
        elif name in file:
            wanted = (file[name], "F")
        else:
            wanted = (defaults[name], "default")
        assert (entry.value, entry.origin) == wanted


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(flags=some_settings())
def test_printed_settings_can_be_loaded(tmp_path_factory: pytest.TempPathFactory, flags: dict[str, Any]) -> None:
    """load_file undoes settings_to_toml."""
    merged = merge_settings(flags=flags, env={}, file={}, file_path="", defaults=default_values({}, is_root=False))
    path = tmp_path_factory.mktemp("c") / "c.toml"
    path.write_bytes(settings_to_toml(merged).encode())
    assert load_file(path) == {name: entry.value for name, entry in merged.items()}


@given(st.integers(1, 1023), st.sampled_from([KIB, MIB, GIB]))
def test_whole_sizes_come_back(count: int, factor: int) -> None:
    """parse_size_bytes undoes format_size for whole numbers of a unit."""
    assert parse_size_bytes(format_size(count * factor), what="x") == count * factor


@given(st.integers(KIB, 2**60))
def test_any_size_comes_back_to_five_percent(size_bytes: int) -> None:
    """One decimal is what is kept."""
    assert parse_size_bytes(format_size(size_bytes), what="x") == pytest.approx(size_bytes, rel=0.05)


@given(st.floats(0, 59.9))
def test_durations_below_a_minute_come_back(duration_s: float) -> None:
    """parse_duration_s undoes format_duration, to what is shown."""
    assert parse_duration_s(format_duration(duration_s), what="x") == pytest.approx(duration_s, abs=0.051)


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    """Nothing else comes out of the parsers of what people type."""
    for parse in (parse_size_bytes, parse_duration_s):
        try:
            assert parse(text, what="x") >= 0
        except UsageError:
            pass


@given(st.binary(min_size=32, max_size=32))
def test_keys_and_ids_are_one_to_one(key: bytes) -> None:
    """An id gives back its key, and only its own spelling does."""
    node_id, account_id = node_id_of(key), account_id_of(key)
    assert public_key_of_node(node_id) == key
    assert public_key_of_account(account_id) == key
    assert is_vm_id(vm_id_of(key))


@given(st.text(max_size=70))
def test_any_text_is_an_id_or_a_usage_error(text: str) -> None:
    """Texts of peers get nothing else out of the parsers of ids."""
    for parse, of in ((public_key_of_node, node_id_of), (public_key_of_account, account_id_of)):
        try:
            assert of(parse(text)) == text
        except UsageError:
            pass


@given(st.dictionaries(st.text(max_size=8), st.sampled_from(["web", "db"]), max_size=6), st.text(max_size=8))
def test_picking_finds_one_of_the_candidates(candidates: dict[str, str], wanted: str) -> None:
    """What is picked was offered, and an exact id picks itself."""
    try:
        found = pick_by_name_or_prefix(wanted, candidates=candidates.items(), what="vm")
    except FormationError:
        assert wanted not in candidates
        return
    assert found in candidates
    assert wanted not in candidates or found == wanted


@settings(max_examples=30, deadline=None)
@given(seed=st.binary(min_size=32, max_size=32))
def test_every_key_comes_back_from_its_file(tmp_path_factory: pytest.TempPathFactory, seed: bytes) -> None:
    """read_key_file undoes write_key_file."""
    path = tmp_path_factory.mktemp("k") / "node.key"
    write_key_file(path, KeyPair(seed))
    assert read_key_file(path).seed == seed


ADDRESSES = st.lists(st.from_regex(r"/[!#-\[\]-~]{1,20}", fullmatch=True), min_size=1, max_size=3)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(addresses=ADDRESSES, name=st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True), founded_ms=TIMES)
def test_every_manifest_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, addresses: list[str], name: str, founded_ms: int
) -> None:
    """read_manifest undoes to_toml, whatever addresses are allowed."""
    manifest = found_network(name, voters=[(name, KEY, addresses)], founded_ms=founded_ms)
    path: Path = tmp_path_factory.mktemp("m") / "network.toml"
    path.write_text(manifest.to_toml())
    assert read_manifest(path).genesis == manifest.genesis


@given(st.recursive(NUMBERS | TEXTS | st.binary(max_size=9), lambda inner: st.lists(inner, max_size=4), max_leaves=9))
def test_plain_values_come_back(value: Any) -> None:
    """decode undoes encode where the type is any."""
    assert decode(encode(value), object) == value


@pytest.mark.slow
def test_node_ids_are_libp2ps() -> None:
    """Our PeerId of a key is the one that libp2p derives from the same seed."""
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    @settings(max_examples=50, deadline=None)
    @given(st.binary(min_size=32, max_size=32))
    def holds(seed: bytes) -> None:
        theirs = create_new_key_pair(seed)
        ours = KeyPair(seed)
        assert theirs.public_key.to_bytes() == ours.public_key
        assert ID.from_pubkey(theirs.public_key).to_base58() == ours.node_id

    holds()
