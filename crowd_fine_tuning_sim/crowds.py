"""Crowds: people, the texts that each holds, and the held-out texts near the emotion that the crowd is to reach.

Texts are untrusted: they are compared and counted, never run, and lose what could garble a terminal or a report.
"""

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from crowd_fine_tuning_sim.settings import KINDS
from experiment.command_line import check_name, nearest
from experiment.errors import InputError
from point_in_space_sim.corpus import EMOTIONS, load_corpus
from point_in_space_sim.engine.assets import PinnedWheel, wheel_folder
from point_in_space_sim.target import distances_to, emotion_target, find_neighbourhood
from user_grouping_evaluation_sim.incentives import TURNS, linked

SOURCES = ("shipped", "chitchat")
HELD_OUT = 3000
"""At most as many texts of people outside a real crowd are mapped to find the neighbourhood among."""
PIECE = 40
"""Words that a text has at most; a longer one is cut at sentence ends."""
LONGEST_SENTENCE = 60
"""Words from which on a sentence is cut inside."""
SHORTEST = 4
"""Words that a piece of a longer text, or a chat message, has at least."""
LEAST_PROBABILITY = 0.1
"""Of the target emotion, in the text nearest to the target: below it the texts do not reach the emotion."""

# BYU Chit-Chat (Myers, Etchart, Fulda 2020; MIT).
CHITCHAT_WHEEL = PinnedWheel(
    package="chitchat-dataset",
    version="0.9.0",
    sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    members={"chitchat_dataset/dataset.json": "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a"},
)

# Control characters that are no white space, those that turn the direction of writing, and halves of characters.
UNSEEN = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
SENTENCE_END = re.compile(r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”’)\]])) ")
# What may lead to a person: an e-mail address or handle, a number of five digits or more, a link.
PERSONAL = re.compile(r"@|\d(?:[ ().-]{0,2}\d){4}|https?:|www\.|\w\.(?:com|org|net|edu)\b|[\w.]+/[\w.]+/", re.I)

Mapper = Callable[[Sequence[str]], np.ndarray]
"""Texts -> vectors (texts, 28)."""


@dataclass(frozen=True)
class Person:
    """Somebody and the texts that they hold. `kind` is one of KINDS, "real" for people of a file or of chitchat.
    later: what they contribute instead from TURNS of the rounds on, if anything."""

    name: str
    kind: str
    texts: tuple[str, ...]
    later: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """All people with a usable text, or, of "shipped", distinct texts without people."""

    name: str
    sha256: str
    people: tuple[Person, ...]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Crowd:
    """near: (k, 28), the k texts nearest to the target, nearest first, that nobody in the crowd holds; the target's own
    text is none of them. vectors: each person's texts' (texts, 28); later: the same of the later ones, (0, 28) if none.
    """

    people: tuple[Person, ...]
    target: str
    near: np.ndarray
    near_texts: tuple[str, ...]
    vectors: tuple[np.ndarray, ...]
    later: tuple[np.ndarray, ...]

    @property
    def centroid(self) -> np.ndarray:
        """(28,), the mean of `near`."""
        return self.near.astype(np.float64).mean(axis=0)

    def texts_at(self, over: float) -> tuple[tuple[str, ...], ...]:
        """What each person contributes when so much of the rounds is over."""
        return tuple(person.later if person.later and over >= TURNS else person.texts for person in self.people)

    def means_at(self, over: float) -> np.ndarray:
        """(n, 28), of each person's vectors."""
        vectors = zip(self.vectors, self.later, strict=True)
        own = [later if len(later) and over >= TURNS else first for first, later in vectors]
        return np.array([each.mean(axis=0) for each in own], dtype=np.float64)


def load_source(name: str, user_column: str = "user", text_column: str = "text") -> Source:
    """
    People and their texts: "chitchat" (BYU Chit-Chat, fetched once), or a .csv, .tsv or .jsonl file with a user and a
    text column. A JSONL line is an object with these keys, or with the user's and `messages`, as chat models are tuned
    on: the text is the assistant's last. "shipped" are the shipped comments, which have no people.

    A file's texts are cleaned and, where long, cut into pieces; what a person repeats is dropped.
    Raises InputError, naming file and line, for anything else, for fewer than two people, and for people all alike.
    """
    if name == "shipped":
        corpus = load_corpus(name)
        return Source(name, corpus.sha256, (), corpus.texts)
    if name == "chitchat":
        return read_chitchat(wheel_folder(CHITCHAT_WHEEL) / "dataset.json")
    path = Path(name)
    reader = {".csv": _read_table, ".tsv": _read_table, ".jsonl": _read_jsonl}.get(path.suffix.lower())
    if reader is None:
        near = nearest(name, SOURCES)
        hint = f"did you mean {near}?" if near else f"give {', '.join(SOURCES)} or a .csv, .tsv or .jsonl file"
        raise InputError(f"crowd {name}: unknown; {hint}")
    content = _read_bytes(path)
    texts: dict[str, dict[str, None]] = {}
    for number, user, text in reader(path, _decoded(path, content), user_column, text_column):
        text = clean(text)
        if not any(character.isprintable() and not character.isspace() for character in text):
            continue
        user = clean(user)
        if not user:
            raise InputError(f"{path}, line {number}: no `{user_column}` in this row; fill it in or remove the row")
        texts.setdefault(user, {}).update(dict.fromkeys(cut(text)))
    return _source(path.name, content, str(path), texts)


def read_chitchat(path: str | Path) -> Source:
    """
    The people of a file in BYU Chit-Chat's form, {conversation: {"messages": [[{"text", "sender"}, ...], ...]}}.

    Messages that a sender wrote one after another are one text. Texts of fewer than 4 or more than 40 words are
    dropped, and those with an address, a link or a number of five digits or more, and what a person repeats.
    """
    content = _read_bytes(Path(path))
    conversations = _parsed(_decoded(path, content), str(path))
    texts: dict[str, dict[str, None]] = {}
    try:
        for conversation in conversations.values():
            for sender, text in _turns(message for turn in conversation["messages"] for message in turn):
                if SHORTEST <= len(text.split()) <= PIECE and not PERSONAL.search(text):
                    texts.setdefault(sender, {})[text] = None
    except (AttributeError, KeyError, TypeError):
        raise InputError(
            f"{path}: not in Chit-Chat's form (conversations with `messages` of `sender` and `text`); delete it"
        ) from None
    return _source("chitchat", content, str(path), texts)


def _turns(messages: Iterator[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """(sender, text) of a conversation's messages, successive ones of a sender joined."""
    sender, parts = "", [""]
    for message in messages:
        if message["sender"] != sender:
            yield clean(sender), clean(" ".join(parts))
            sender, parts = message["sender"], []
        parts.append(message["text"])
    yield clean(sender), clean(" ".join(parts))


def _read_table(path: Path, content: str, user_column: str, text_column: str) -> Iterator[tuple[int, str, str]]:
    """(line, user, text) of the rows of a CSV or TSV file; lines as an editor counts, where a row begins."""
    kind = path.suffix[1:].upper()
    reader = csv.reader(io.StringIO(content, newline=""), delimiter="\t" if kind == "TSV" else ",", strict=True)
    names: list[str] = []
    before = 0
    try:
        for fields in reader:
            number, before = before + 1, reader.line_num
            if len(fields) < 2 and not "".join(fields).strip():
                continue
            if not names:
                names = [name.strip() for name in fields]
                user_at, text_at = (_column(path, names, column) for column in (user_column, text_column))
            elif len(fields) != len(names):
                hint = "; quote texts that hold a separator" if len(fields) > len(names) else ""
                raise InputError(f"{path}, line {number}: {len(fields)} fields where the header has {len(names)}{hint}")
            else:
                yield number, fields[user_at], fields[text_at]
    except csv.Error as error:
        raise InputError(f"{path}, line {before + 1}: not valid {kind} ({error})") from None
    if not names:
        raise InputError(f"{path}: the file is empty; give one with a header and a row for each text")


def _column(path: Path, names: list[str], wanted: str) -> int:
    if wanted not in names:
        raise InputError(f"{path}, line 1: {_no_column(wanted, names)}")
    if names.count(wanted) > 1:
        raise InputError(f"{path}, line 1: column `{wanted}` stands twice; rename or remove one")
    return names.index(wanted)


def _no_column(wanted: str, names: Sequence[str]) -> str:
    return f"no column `{wanted}` (columns: {clean(', '.join(names[:8])) or 'none'}); name the one to read"


def _read_jsonl(path: Path, content: str, user_column: str, text_column: str) -> Iterator[tuple[int, str, str]]:
    """(line, user, text) of a JSONL file's objects."""
    # Split on line feeds only: JSON strings may hold other characters that str.splitlines takes for line ends.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parsed(line, where)
        if not isinstance(row, dict):
            raise InputError(f'{where}: no JSON object; write {{"{user_column}": ..., "{text_column}": ...}}')
        if user_column not in row:
            raise InputError(f"{where}: {_no_column(user_column, list(row))}")
        user = row[user_column]
        if isinstance(user, bool) or not isinstance(user, str | int):
            raise InputError(f"{where}: `{user_column}` is neither text nor a whole number; write who wrote the text")
        if text_column in row:
            text = row[text_column]
        elif "messages" in row:
            text = _last_answer(row["messages"], where)
        else:
            raise InputError(f"{where}: {_no_column(text_column, list(row))}")
        if not isinstance(text, str):
            raise InputError(f"{where}: the text is {type(text).__name__}, not a string; quote it")
        yield number, str(user), text


def _last_answer(messages: Any, where: str) -> Any:
    for message in reversed(messages) if isinstance(messages, list) else ():
        if isinstance(message, dict) and message.get("role") == "assistant":
            return message.get("content")
    raise InputError(f"{where}: `messages` has no message whose role is assistant; add one, or remove the line")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if ", line " in where else f"{where}, line {error.lineno}"
        raise InputError(f"{place}: not valid JSON ({error.msg} at character {error.colno})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets thousands deep
        raise InputError(f"{where}: JSON that is too deep or holds too long a number; remove it") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"crowd {path}: no such file; give {', '.join(SOURCES)} or a file that there is") from None
    except OSError as error:
        raise InputError(f"crowd {path}: cannot be read ({error.strerror}); give a file") from None


def _decoded(path: str | Path, content: bytes) -> str:
    """UTF-8 text without a byte-order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _source(name: str, content: bytes, where: str, texts: dict[str, dict[str, None]]) -> Source:
    people = tuple(Person(user, "real", tuple(held)) for user, held in texts.items() if held)
    if len(people) < 2:
        what = f"all texts are {people[0].name[:40]}'s" if people else "nobody has a text"
        raise InputError(f"{where}: {what}; a crowd needs at least two people")
    _refuse_alike(where, people)
    return Source(name, sha256(content).hexdigest(), people)


def _refuse_alike(where: str, people: Sequence[Person]) -> None:
    if len(people) > 1 and len({frozenset(person.texts) for person in people}) == 1:
        raise InputError(f"{where}: all {len(people)} people hold the same texts; nothing tells them apart, add others")


def clean(text: str) -> str:
    """The text on one line, white space made single, without control characters."""
    return " ".join(UNSEEN.sub("", text).split())


def cut(text: str) -> list[str]:
    """
    A clean text of up to 40 words as it is. A longer one's sentences, joined up to 40 words a piece; pieces of fewer
    than 4 words are dropped, and a sentence of more than 60 words is cut after every 40th.
    """
    if len(text.split()) <= PIECE:
        return [text]
    pieces: list[list[str]] = [[]]
    for sentence in SENTENCE_END.split(text):
        words = sentence.split()
        step = PIECE if len(words) > LONGEST_SENTENCE else len(words)
        for part in (words[i : i + step] for i in range(0, len(words), step)):
            if pieces[-1] and len(pieces[-1]) + len(part) > PIECE:
                pieces.append([])
            pieces[-1] += part
    return [" ".join(piece) for piece in pieces if len(piece) >= SHORTEST]


def eligible(source: Source, texts_per_user: int) -> tuple[Person, ...]:
    """The people with at least so many texts."""
    return tuple(person for person in source.people if len(person.texts) >= texts_per_user)


def real_crowd(
    source: Source,
    target: str,
    num_users: int,
    texts_per_user: int,
    neighbours: int,
    map_texts: Mapper,
    rng: np.random.Generator,
) -> Crowd:
    """
    Draws num_users of the people, and of each texts_per_user texts. The neighbourhood is found among other people's
    texts, at most 3,000 of them; where these are too few, the crowd's own texts that were not drawn are held out too.

    Raises InputError where people or held-out texts are too few, or none is near the target emotion.
    """
    check_name("target", target, EMOTIONS)
    able = eligible(source, texts_per_user)
    if len(able) < num_users:
        raise InputError(
            f"{source.name}: {len(able)} people have {texts_per_user} texts or more, {num_users} are asked for; "
            "choose fewer users, or fewer texts of each"
        )
    drawn = [able[i] for i in rng.choice(len(able), num_users, replace=False)]
    people = tuple(
        Person(
            person.name, "real", tuple(person.texts[i] for i in rng.choice(len(person.texts), texts_per_user, False))
        )
        for person in drawn
    )
    _refuse_alike(source.name, people)
    names = {person.name for person in drawn}
    held = {_key(text) for person in people for text in person.texts}
    outside = [person for person in source.people if person.name not in names]
    held_out = _not_held(outside, held)
    if len(held_out) <= neighbours:
        held_out = _not_held([*outside, *drawn], held)
    if len(held_out) <= neighbours:  # the target itself is one of them
        raise InputError(
            f"{source.name}: {len(held_out)} texts are held by nobody in the crowd, {neighbours + 1} are needed; "
            "choose fewer neighbours, users or texts of each"
        )
    if len(held_out) > HELD_OUT:
        held_out = [held_out[i] for i in np.sort(rng.choice(len(held_out), HELD_OUT, replace=False))]
    vectors = map_texts([*held_out, *(text for person in people for text in person.texts)])
    candidates = vectors[: len(held_out)]
    members = find_neighbourhood(emotion_target(target, candidates), candidates, neighbours).members
    _refuse_far(source, target, candidates[members[0]])
    own = vectors[len(held_out) :].reshape(num_users, texts_per_user, -1)
    near_texts = tuple(held_out[i] for i in members)
    return Crowd(people, target, candidates[members], near_texts, tuple(own), (own[0][:0],) * num_users)


def _not_held(people: Sequence[Person], held: set[str]) -> list[str]:
    """The distinct texts of people that are not held, not even in other letter case or with other punctuation."""
    return [text for text in dict.fromkeys(t for person in people for t in person.texts) if _key(text) not in held]


def simulated_crowd(
    source: Source,
    target: str,
    kinds: Sequence[str],
    texts_per_user: int,
    neighbours: int,
    map_texts: Mapper,
    rng: np.random.Generator,
) -> Crowd:
    """
    A user of each kind, dealt of the source's texts, which are distinct; nobody but a copyist holds another's text.

    "on": texts near the target. "off": near another emotion, each near another one while there are any. "half": half
    and half. "random": any. "spammer": one text near another emotion, repeated. "copyist": all that the first "on" user
    or turncoat holds, or, without one, the first user who is no copyist. "turncoat": as "on", and later as "off";
    everybody else holds what they would if it were "on".
    Raises InputError for unknown kinds, too few texts, or if none held out is near the target emotion.
    """
    check_name("target", target, EMOTIONS)
    for kind in kinds:
        check_name("kind of user", kind, KINDS)
    original = next((i for i, kind in enumerate(kinds) if kind in ("on", "turncoat")), None)
    if original is None:
        original = next((i for i, kind in enumerate(kinds) if kind != "copyist"), None)
    if original is None:
        raise InputError("kinds of users: nobody but copyists; add somebody whom they can copy")
    near_target = {"on": texts_per_user, "turncoat": texts_per_user, "half": texts_per_user - texts_per_user // 2}
    near_other = {"off": texts_per_user, "half": texts_per_user // 2, "spammer": 1}
    wanted = neighbours + sum(near_target.get(kind, 0) for kind in kinds)
    any_other = ("random", "turncoat")
    needed = 1 + wanted + sum(near_other.get(kind, texts_per_user * (kind in any_other)) for kind in kinds)
    if len(source.texts) < needed:
        raise InputError(
            f"{source.name}: has {len(source.texts)} texts to deal, {needed} are needed; "
            "choose fewer users, texts of each or neighbours"
        )
    vectors = map_texts(source.texts)
    aim = emotion_target(target, vectors)
    free = np.arange(len(vectors)) != aim.comment
    pool = _nearest(aim.vector, vectors, free, wanted)
    others = [emotion for emotion in rng.permutation(list(EMOTIONS)).tolist() if emotion != target]
    dealt: list[list[int]] = [[] for _ in kinds]

    def deal(user: int, texts: np.ndarray) -> None:
        free[texts] = False
        dealt[user] += texts.tolist()

    shuffled = rng.permutation(pool)
    for alike in (("on", "turncoat"), ("half",)):
        for user in _of_kind(kinds, *alike):
            kind = kinds[user]
            deal(user, shuffled[: near_target[kind]])
            shuffled = shuffled[near_target[kind] :]
    far = free.copy()
    far[pool] = False

    def near_another(number: int, size: int) -> np.ndarray:
        other = emotion_target(others[number % len(others)], vectors)
        return _nearest(other.vector, vectors, far & free, size)

    first_off = _of_kind(kinds, *near_other)
    for number, user in enumerate(first_off):
        deal(user, near_another(number, near_other[kinds[user]]))
    for user in _of_kind(kinds, "random"):
        deal(user, rng.choice(np.flatnonzero(free), texts_per_user, replace=False))
    later: list[list[int]] = [[] for _ in kinds]
    for number, user in enumerate(_of_kind(kinds, "turncoat"), start=len(first_off)):
        later[user] = near_another(number, texts_per_user).tolist()
        free[later[user]] = False
    for user in _of_kind(kinds, "spammer"):
        dealt[user] *= texts_per_user
    for user in _of_kind(kinds, "copyist"):
        dealt[user] = dealt[original]
    people = tuple(
        Person(f"user {i + 1}", kind, *(tuple(source.texts[k] for k in own) for own in (dealt[i], later[i])))
        for i, kind in enumerate(kinds)
    )
    _refuse_alike("kinds of users", people)
    near = _nearest(aim.vector, vectors, free, neighbours)
    _refuse_far(source, target, vectors[near[0]])
    near_texts = tuple(source.texts[i] for i in near)
    held = (tuple(vectors[np.array(texts, dtype=int)] for texts in own) for own in (dealt, later))
    return Crowd(people, target, vectors[near], near_texts, *held)


def _of_kind(kinds: Sequence[str], *wanted: str) -> list[int]:
    return [i for i, kind in enumerate(kinds) if kind in wanted]


def _nearest(point: np.ndarray, vectors: np.ndarray, free: np.ndarray, size: int) -> np.ndarray:
    """Indices (size,) of the free texts nearest to the point, nearest first. vectors: (n, 28); free: (n,), bool."""
    distances = np.where(free, distances_to(point, vectors), np.inf)
    return np.argsort(distances, kind="stable")[:size]


def _refuse_far(source: Source, target: str, vector: np.ndarray) -> None:
    """vector: (28,), of the held-out text that is nearest to the target."""
    probability = vector[EMOTIONS.index(target)]
    if not probability >= LEAST_PROBABILITY:
        raise InputError(
            f"{source.name}: no held-out text is near {target} (the nearest has a probability of {probability:.2f}, "
            f"below {LEAST_PROBABILITY}); choose another target or other texts"
        )


def near_duplicates(people: Sequence[Person]) -> np.ndarray:
    """
    How many of each person's texts, (n,), have a near-duplicate among the other people's: one that is equal but for
    letter case and all that is neither letter nor digit, or whose word 3-shingles have a Jaccard similarity with the
    text's of at least 0.8.
    """
    holders = _holders_of_alike(people)
    return np.array([sum(who != {i} for who in own) for i, own in enumerate(holders)], dtype=np.int64)


def taken_for(people: Sequence[Person], share: float) -> np.ndarray:
    """
    Who is taken for whom by their texts, (n,): the first person whom one reaches by chains of people of whom one holds
    near-duplicates of at least `share` of the other's texts. For incentives.split_by.
    """
    near = np.zeros((len(people), len(people)), dtype=bool)
    for i, own in enumerate(_holders_of_alike(people)):
        counts = Counter(other for who in own for other in who)
        for other, count in counts.items():
            near[i, other] = count >= share * len(own)
    return linked(near)


def _holders_of_alike(people: Sequence[Person]) -> list[list[set[int]]]:
    """Of each text of each person, who holds a near-duplicate of it, the person included."""
    keys = [[_key(text) for text in person.texts] for person in people]
    shingles = [[_shingles(text) for text in person.texts] for person in people]
    by_key, by_shingles = _holders(keys), _holders(shingles)
    like = _similar([shingle_set for shingle_set in by_shingles if shingle_set])
    return [
        [
            by_key[key].union(*(by_shingles[other] for other in like.get(own, ())))
            for key, own in zip(keys[person], shingles[person], strict=True)
        ]
        for person in range(len(people))
    ]


def _key(text: str) -> str:
    """The text's letters and digits, whatever their case; the text itself where it has none."""
    return "".join(filter(str.isalnum, text.casefold())) or text


def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Each three words that follow one another, of letters and digits; empty for a shorter text."""
    words = ["".join(filter(str.isalnum, word)) for word in text.casefold().split()]
    words = [word for word in words if word]
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def _holders(items: Sequence[Sequence[Hashable]]) -> dict[Any, set[int]]:
    """Who holds each item. items: each person's."""
    holders: dict[Any, set[int]] = defaultdict(set)
    for person, held in enumerate(items):
        for item in held:
            holders[item].add(person)
    return holders


def _similar(sets: Sequence[frozenset[tuple[str, ...]]]) -> dict[frozenset[tuple[str, ...]], list[frozenset]]:
    """Of each set those, itself included, whose Jaccard similarity with it is at least 0.8. sets: distinct, none empty.

    Two sets so similar share one of the rarest n // 5 + 1 of each one's n elements: only sets that do are compared.
    """
    count = Counter(element for elements in sets for element in elements)
    rare = [sorted(elements, key=lambda e: (count[e], e))[: len(elements) // 5 + 1] for elements in sets]
    index: dict[tuple[str, ...], list[frozenset]] = defaultdict(list)
    for elements, prefix in zip(sets, rare, strict=True):
        for element in prefix:
            index[element].append(elements)
    return {
        elements: [
            other
            for other in dict.fromkeys(candidate for element in prefix for candidate in index[element])
            if 5 * len(elements & other) >= 4 * len(elements | other)  # in whole numbers, so that 0.8 is 0.8
        ]
        for elements, prefix in zip(sets, rare, strict=True)
    }
