"""Damaged and odd variants of good inputs, the same ones for the same seed: bytes changed, values of another kind, texts with what parsers trip over."""
import contextlib
import copy
import json
import random
import signal
import time

ODD_BYTES = [b"", b"\xff", b"\0", b"[" * 3000, b"9" * 5000, b"null", b'"', b"{}", b"-1", b"\\ud83d", b"\r", b"NaN", b"1e999", b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b"\x80\x02"]
ODD_VALUES = [
    None, True, False, 0, -1, 1.5, 10**30, -10**400, float("nan"), float("inf"), "", "x", "10", "a" * 300, "../../x", "a\0b", "\ud83d", "a\nb", [], {}, [[]], [None], ["a", 1],
    {"a": 1}, {"": None}, [1, 2, 3, 4, 5], "2024-13-45", "é" * 200,
]
ODD_TEXTS = [
    "", " ", "(", ")", "[", "'", '"', "==", "in", "not", "and", "or", "is", "None", "True", "1e999", "9" * 400, "-", "~", "lambda", "{", "}", ":", ",", ".", "\0", "\n", "\\", "é", "\u200b", "0x", "1_0",
    "0" * 50, "nan", "inf", "99999", "-1", "T", "Z", "+99:99", "2024-02-30", "0001-01-01", "9999-12-31", "x" * 300, "*", "**", "@", "#", "$", "%s", "\ud83d", "_", "__class__", "()", "[]", "f''", "b''",
]


def mutate_bytes(good: bytes, rng: random.Random) -> bytes:
    "A few places changed, dropped, doubled or filled with something odd; now and then cut short."
    data = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        random_bytes = bytes(rng.randrange(256) for _ in range(rng.randint(0, 3)))
        put = rng.choice(ODD_BYTES) if rng.random() < .3 else random_bytes * rng.choice([1, 1, 1, 1, 200])
        data[at:at + rng.choice([0, len(put), rng.randint(0, 5)])] = put
    if rng.random() < .1: del data[rng.randrange(len(data) + 1):]
    return bytes(data)


def _places(value, found):
    for key in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        found.append((value, key))
        _places(value[key], found)
    return found


def mutate_value(good, rng: random.Random):
    "One to three values of a nested structure replaced by odd ones, removed, renamed or wrapped."
    value = {"top": copy.deepcopy(good)}
    for _ in range(rng.randint(1, 3)):
        places = _places(value, [])
        if not places: break
        holder, key = rng.choice(places if rng.random() < .5 else places[:8])
        what = rng.random()
        if what < .7: holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif what < .8 and holder is not value: del holder[key]
        elif what < .9: holder[key] = [holder[key]]
        elif isinstance(holder, dict) and holder is not value: holder[str(rng.choice(ODD_VALUES))[:300]] = holder.pop(key)
    return value["top"]


def mutate_json(good: bytes, rng: random.Random) -> bytes:
    "A JSON file: half of the time its values, half of the time its bytes."
    if rng.random() < .4: return mutate_bytes(good, rng)
    return json.dumps(mutate_value(json.loads(good), rng)).encode(errors="replace")


def mutate_lines(good: bytes, rng: random.Random) -> bytes:
    "A file of JSON lines."
    lines = good.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng) + b"\n"
    return b"".join(lines)


def mutate_table(good: bytes, rng: random.Random) -> bytes:
    "A CSV or TOML file: a field replaced, or bytes."
    if rng.random() < .5: return mutate_bytes(good, rng)
    lines = good.decode().split("\n")
    at = rng.randrange(len(lines))
    fields = lines[at].split(",")
    fields[rng.randrange(len(fields))] = str(rng.choice(ODD_VALUES + ODD_TEXTS))
    lines[at] = ",".join(fields)
    return "\n".join(lines).encode(errors="replace")


def mutate_text(good: str, rng: random.Random) -> str:
    "A sentence, filter or date with characters dropped, doubled and put in."
    text = good
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(ODD_TEXTS) + text[at + rng.randint(0, 6):]
    return text


class TooSlow(BaseException):
    "Not caught by readers that turn any exception into one line."


@contextlib.contextmanager
def time_limit(seconds: float):
    "Stop what takes longer (between two steps of Python), and what took longer inside a library."
    def stop(*args): raise TooSlow(f"more than {seconds} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.process_time()
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if time.process_time() - began > seconds: raise TooSlow(f"{time.process_time() - began:.1f} s")
