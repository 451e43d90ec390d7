"""Features for ten concepts in English books: found on ten books, scored on ten others.

    python benchmarks/concepts.py BOOKS MODEL DICTIONARY [OTHER ...] [--words 13]

BOOKS is a folder of plain-text English books, MODEL a language model, DICTIONARY and OTHER dictionaries of it at one
hook point, such as those of a sweep over seeds. From each book, passages (the beginnings of paragraphs) are drawn at
random, and in each passage as many words with as without a concept, by the rules in `CONCEPTS`, until there are
`--words` of each. Rules and word lists were written before any result, and nobody chose or edited a passage. An example
is the last token of a word; the model has read the passage up to it and nothing after.

`sae.probing.find_concept` chooses a feature on one half of the books and scores it on the other half; its standard
error is over books. Next to it: the best neuron of the same search, the same search with labels shuffled within books,
the other dictionaries, and a dictionary of the same size with random directions.

    python benchmarks/concepts.py --again

writes the report of a run anew from its JSON file, without measuring.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch

import sae
from sae.architectures import TopK
from sae.dictionary.token_policy import TokenPolicy
from sae.results.estimate import Estimate
from sae.text.endings import last_tokens
from sae.training.initialise import initialise_

TITLE = "Features for ten concepts"
WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)?|\d[\d,.]*\d|\d")
MOST_WORDS, LEAST_WORDS = 90, 40
"""Words of a passage; shorter paragraphs are left out, longer ones cut."""
FIRST = 4
"""Words at the beginning of a passage that are no examples."""
PER_PASSAGE = 2
"""Most words with a concept, and without it, that are drawn from a passage."""

NEGATIONS = set("not no never none nothing nobody nor neither without".split())
NUMBERS = set(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million dozen".split()
)
PRONOUNS = set("i me he him she her we us they them it you myself himself herself themselves itself yourself".split())
TIMES = set(
    "day days night nights morning evening afternoon hour hours minute minutes moment week weeks month months "
    "year years today yesterday tomorrow soon already ago once always often now when while".split()
)
TITLES = set(
    "Mr Mrs Miss Ms Dr Sir Lady Captain Colonel Doctor Professor Aunt Uncle Lord King Queen Madame Monsieur".split()
)
PLACES = set(
    "England London Scotland Ireland Wales Britain France Paris Spain Madrid Portugal Lisbon Italy Rome Venice "
    "Florence Naples Greece Athens Turkey Egypt Africa Asia Europe America India China Japan Russia Germany "
    "Berlin Austria Vienna Switzerland Geneva Holland Amsterdam Denmark Norway Sweden Poland Boston York "
    "Philadelphia Massachusetts Georgia Virginia Pennsylvania Carolina Kentucky Missouri Mississippi Chile Peru "
    "Lima Brazil Valparaiso Patagonia Australia Zealand Nantucket Concord Bath Kent Surrey Yorkshire Oxford "
    "Cambridge Bristol Liverpool Edinburgh Dublin Styles Essex Derbyshire Hertfordshire Highbury Richmond Woking "
    "Ingolstadt Atlanta Avonlea Charlottetown Canada".split()
)
IRREGULAR_PAST = set(
    "was were had did said went came saw took gave made knew thought found told felt left kept brought began "
    "stood heard held ran sat spoke wrote fell rose grew lay led met paid sent slept spent won lost drew drove "
    "ate threw broke".split()
)
BEFORE_NOUNS = set(
    "the these those many some few several all my his her our their your of two three four other".split()
)
NOT_PLURAL = set("this his its is was has as us yes thus less perhaps always towards news gas bus lens besides".split())


@dataclass(frozen=True)
class Word:
    """A word of a passage.

    Attributes:
        text: the word.
        before: the words before it in its sentence, nearest first.
        ends_in: what ends its sentence, `.`, `!` or `?`; empty if the passage ends first.
        quoted: whether it is between double quotation marks; None if the marks of the passage are not in pairs.
        first: whether it begins its sentence or quotation.
    """

    text: str
    before: tuple[str, ...]
    ends_in: str
    quoted: bool | None
    first: bool


@dataclass(frozen=True)
class Concept:
    """A rule that labels words.

    Attributes:
        rule: in words.
        label: True, False, or None for a word that is no example.
        of_token: whether the word alone decides the label.
    """

    rule: str
    label: Callable[[Word], bool | None]
    of_token: bool


def _negated(word: Word) -> bool | None:
    near = [before.lower() for before in word.before[:3]]
    if word.text.lower() in NEGATIONS or word.text.lower().endswith(("n't", "n’t")):
        return None
    return any(before in NEGATIONS or before.endswith(("n't", "n’t")) for before in near)


def _name(word: Word) -> bool | None:
    if word.first or not word.text[0].isupper() or word.text in TITLES or word.text == "I" or len(word.text) < 3:
        return None
    titled = bool(word.before) and word.before[0].rstrip(".") in TITLES
    return True if titled else None if word.text in PLACES else False


def _place(word: Word) -> bool | None:
    if word.first or not word.text[0].isupper() or word.text == "I" or len(word.text) < 3:
        return None
    return word.text in PLACES


def _plural(word: Word) -> bool | None:
    text = word.text.lower()
    if not word.before or word.before[0].lower() not in BEFORE_NOUNS or len(text) < 4 or "'" in text or "’" in text:
        return None
    return text.endswith("s") and not text.endswith(("ss", "us", "is")) and text not in NOT_PLURAL


def _past(word: Word) -> bool | None:
    text = word.text.lower()
    return text in IRREGULAR_PAST or (text.endswith("ed") and len(text) > 4)


CONCEPTS = {
    "negation": Concept("one of the three words before is a negation (not, no, never, -n't, …)", _negated, False),
    "past tense": Concept(f"ends in -ed, or is one of {len(IRREGULAR_PAST)} irregular past forms", _past, True),
    "personal names": Concept(
        "capitalised word after a title (Mr, Mrs, Captain, …), against other capitalised words", _name, False
    ),
    "numbers": Concept(
        "digits, or a number word from two on",
        lambda word: word.text[0].isdigit() or word.text.lower() in NUMBERS, True,
    ),
    "questions": Concept(
        "the sentence ends in ?, which the model has not read yet, against .",
        lambda word: {"?": True, ".": False}.get(word.ends_in), False,
    ),
    "dialogue": Concept("between double quotation marks, against outside in passages that have them",
                        lambda word: word.quoted, False),
    "plural": Concept("ends in -s, against other words, both after the, these, his, of, …", _plural, True),
    "pronouns": Concept("a personal or reflexive pronoun", lambda word: word.text.lower() in PRONOUNS, True),
    "places": Concept(f"one of {len(PLACES)} names of places, against other capitalised words", _place, True),
    "time words": Concept(f"one of {len(TIMES)} words of time (day, hour, soon, now, …)",
                          lambda word: word.text.lower() in TIMES, True),
}  # fmt: skip


@dataclass(frozen=True)
class Passage:
    """The beginning of a paragraph, its words, and the place after the last character of each."""

    book: int
    text: str
    words: tuple[Word, ...]
    ends: tuple[int, ...]


def words_of(paragraph: str) -> tuple[list[Word], list[int]]:
    """The words of a whole paragraph, and where each ends."""
    matches = list(WORD.finditer(paragraph))
    marks = [match.start() for match in re.finditer('["“”]', paragraph)]
    in_pairs = bool(marks) and len(marks) % 2 == 0
    in_pairs = in_pairs and all(paragraph[place] != "“”"[1 - number % 2] for number, place in enumerate(marks))
    sentences: list[tuple[list[int], str]] = [([], "")]
    opened: set[int] = set()
    for number, match in enumerate(matches):
        after = matches[number + 1].start() if number + 1 < len(matches) else len(paragraph)
        gap = paragraph[match.end() : after]
        sentences[-1][0].append(number)
        asked = next((mark for mark in gap if mark in "?!"), "")
        ended = (
            "." in gap and match[0] not in (*TITLES, "St") and (after == len(paragraph) or paragraph[after].isupper())
        )
        if asked or ended:
            sentences[-1] = (sentences[-1][0], asked or ".")
            sentences.append(([], ""))
        if re.search('["“‘(]', gap):
            opened.add(number + 1)
    words: list[Word] = []
    for members, ends_in in sentences:
        for place, number in enumerate(members):
            before = tuple(matches[earlier][0] for earlier in reversed(members[max(0, place - 3) : place]))
            inside = sum(mark < matches[number].start() for mark in marks) % 2 == 1
            first = place == 0 or number in opened
            words.append(Word(matches[number][0], before, ends_in, inside if in_pairs else None, first))
    return words, [match.end() for match in matches]


def passages_of(book: int, text: str, count: int, rng: random.Random) -> list[Passage]:
    """Random paragraphs from the middle of a book, without its front matter and licence."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    paragraphs = paragraphs[len(paragraphs) // 10 : -max(1, len(paragraphs) // 20)]
    long = [paragraph for paragraph in dict.fromkeys(paragraphs) if len(WORD.findall(paragraph)) >= LEAST_WORDS]
    drawn = []
    for paragraph in rng.sample(long, min(count, len(long))):
        words, ends = words_of(paragraph)
        kept = slice(0, MOST_WORDS)
        drawn.append(Passage(book, paragraph[: ends[kept][-1]], tuple(words[kept]), tuple(ends[kept])))
    return drawn


def draw_words(
    concept: Concept, passages: list[Passage], most: int, rng: random.Random
) -> Iterator[tuple[int, int, bool]]:
    """Passage, word and label of the examples: from each passage as many with as without the concept, at most
    `PER_PASSAGE`, until there are `most` of a book.
    """
    taken: dict[int, int] = {}
    for number, passage in enumerate(passages):
        sides: dict[bool, list[int]] = {True: [], False: []}
        for place, word in enumerate(passage.words):
            label = concept.label(word) if place >= FIRST else None
            if label is not None:
                sides[label].append(place)
        count = min(PER_PASSAGE, most - taken.get(passage.book, 0), *map(len, sides.values()))
        taken[passage.book] = taken.get(passage.book, 0) + count
        for label, found in sides.items():
            yield from ((number, place, label) for place in rng.sample(found, count))


def read(
    model: sae.LanguageModel, hook: str, policy: TokenPolicy, passages: list[Passage], wanted: list[tuple[int, int]]
) -> sae.probing.LabelledActivations:
    """Activations at the last token of each wanted word."""
    begin = (model.bos,) if policy.prepend_bos and model.bos is not None else ()
    places = last_tokens(model.tokenizer, [passage.text for passage in passages], model.info.max_context - 1)
    positions = []
    for number, word in wanted:
        end = passages[number].ends[word]
        [token] = ((places[number][:, 0] < end) & (end <= places[number][:, 1])).nonzero()[0][:1].tolist()
        positions.append(len(begin) + token)
    last: dict[int, int] = {}
    for (number, _), position in zip(wanted, positions, strict=True):
        last[number] = max(position, last.get(number, 0))
    contexts = tuple(  # the model need not read on after the last example
        (*begin, *tokens[:, 2].tolist())[: last.get(number, 0) + 1] for number, tokens in enumerate(places)
    )
    example = tuple(range(len(wanted)))
    books = tuple(passages[number].book for number, _ in wanted)
    examples = sae.probing.Examples(
        contexts, tuple(number for number, _ in wanted), tuple(positions), example, ("",) * len(wanted), books, 0
    )
    return sae.probing.read_activations(
        model, hook, examples, lambda done, total: print(f"{done:,} of {total:,} tokens", file=sys.stderr, flush=True)
    )


def random_dictionary(like: sae.Dictionary, rows: torch.Tensor, k: int) -> sae.Dictionary:
    """Random directions around the rows' centre, of which the k strongest fire."""
    made = TopK(like.d_in, like.d_sae, k=k)
    initialise_(made, rows, torch.Generator().manual_seed(0))
    return made.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, nargs="?", help="folder of plain-text books")
    parser.add_argument("model", nargs="?", help="language model")
    parser.add_argument("dictionaries", nargs="*", help="dictionaries of it at one hook point")
    parser.add_argument("--trained-on", type=int, help="number of the books that the dictionaries were trained on")
    parser.add_argument("--passages", type=int, default=200, help="most of them per book")
    parser.add_argument("--words", type=int, default=13, help="most words with a concept, and without it, per book")
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="concepts", help="of the files in docs/results/")
    parser.add_argument("--again", action="store_true", help="write the report anew from NAME.json")
    arguments = parser.parse_args()
    if arguments.again:
        numbers = json.loads((report.RESULTS / f"{arguments.name}.json").read_text(encoding="utf-8"))
        described = numbers.pop("machine")
        report.write(arguments.name, TITLE, text(numbers), numbers, described)
        return
    if not arguments.dictionaries:
        parser.error("give BOOKS, MODEL and DICTIONARY, or --again")
    began, described = time.perf_counter(), report.machine()
    rng = random.Random(f"concepts {arguments.seed}")
    files = sorted(arguments.books.glob("*.txt"))
    passages = [
        passage
        for book, file in enumerate(files)
        for passage in passages_of(book, file.read_text(encoding="utf-8-sig"), arguments.passages, rng)
    ]
    drawn = {name: list(draw_words(one, passages, arguments.words, rng)) for name, one in CONCEPTS.items()}
    wanted = sorted({(number, place) for found in drawn.values() for number, place, _ in found})
    used = len({number for number, _ in wanted})
    row_of = {one: row for row, one in enumerate(wanted)}
    dictionaries = [sae.load(place) for place in arguments.dictionaries]
    origin = dictionaries[0].origin
    hook, policy = str(origin.reads.hook), TokenPolicy.from_json(origin.tokens)
    data = read(sae.LanguageModel(arguments.model), hook, policy, passages, wanted)
    seconds = time.perf_counter() - began
    k = int(dictionaries[0].settings().get("k", 32))
    others = [*dictionaries[1:], random_dictionary(dictionaries[0], data.rows, k)]
    settings = sae.probing.ConceptConfig(
        positive="with", permutations=arguments.permutations, seed=arguments.seed, listed=3
    )
    results: dict[str, list[sae.probing.ConceptSearch]] = {}
    for name, found in drawn.items():
        rows = torch.tensor([row_of[number, place] for number, place, _ in found])
        labels = ["with" if label else "without" for *_, label in found]
        groups = data.groups[rows].tolist()
        results[name] = [
            sae.probing.find_concept(one, data.rows[rows], labels, settings, groups=groups, name=name)
            for one in (dictionaries[0], *others)
        ]
        print(name, results[name][0].best, flush=True)
    described |= {"hook": hook, "dictionary": shape(dictionaries[0])}
    measured = {name: value for name, value in vars(arguments).items() if name != "again"}
    numbers = {
        "passages": used, "books": len(files), "words": len(wanted),
        "reading_seconds": round(seconds, 1), "arguments": {**measured, "books": arguments.books.name,
        "model": Path(arguments.model).name, "dictionaries": [Path(one).name for one in arguments.dictionaries]},
        "rules": {name: {"rule": one.rule, "of_token": one.of_token} for name, one in CONCEPTS.items()},
        "concepts": {name: [result.to_json() for result in found] for name, found in results.items()},
    }  # fmt: skip
    report.write(arguments.name, TITLE, text(numbers), numbers, described)


def shape(dictionary: sae.Dictionary) -> str:
    return f"{dictionary.architecture}, {dictionary.d_in} → {dictionary.d_sae:,}"


def estimate(record: dict[str, Any], *, sign: bool = False) -> str:
    shown = str(Estimate.from_json(record))
    return f"+{shown}" if sign and record["value"] > 0 else shown


def p_of(result: dict[str, Any]) -> str:
    p = result["features"][0]["p"]
    return f"{'≤ ' if p * (1 + result['settings']['permutations']) < 1.5 else ''}{p:.2g}"


def text(numbers: dict[str, Any]) -> str:
    """The report: where from, scores, then the rules."""
    head = [
        "concept", "examples", "feature", "AUC", "best neuron", "difference", "p", "labels shuffled",
        "other seeds", "difference, other seeds", "random directions",
    ]  # fmt: skip
    cells, rules = [], numbers["rules"]
    for name, (result, *others, chance) in numbers["concepts"].items():
        best, null = result["features"][0], result["null"]
        cells.append([
            f"{name}{' †' if rules[name]['of_token'] else ''}", f"{sum(result['examples']) + sum(result['held_out'])}",
            str(best["index"]), estimate(best["auc"]), estimate(result["neuron"]["auc"]),
            estimate(result["gain"], sign=True), p_of(result),
            f"{null['auc']:.3f} ± {null['deviation']:.3f} ({null['search_auc']:.3f})",
            ", ".join(estimate(other["features"][0]["auc"]) for other in others) or "–",
            ", ".join(estimate(other["gain"], sign=True) for other in others) or "–",
            f"{estimate(chance['features'][0]['auc'])} (p {p_of(chance)})",
        ])  # fmt: skip
    seeds = [found[:-1] for found in numbers["concepts"].values()]
    held_out = sorted({result["groups"][1] for found in seeds for result in found})
    trained_on = numbers["arguments"].get("trained_on")
    return (
        f"Model {numbers['arguments']['model']}. {numbers['passages']:,} passages of {numbers['books']} books; a "
        "feature is chosen on half of the books, and its AUC is of the other half.\n"
        + ("" if trained_on is None else f"{trained_on} of the books are training text of the dictionaries.\n")
        + "\n" + report.table(head, cells) + "\n"
        "† The word alone decides the label: a feature for these tokens is enough. AUC ½ is chance; ± is the "
        f"standard error over the {' or '.join(map(str, held_out))} books that are scored (DeLong's, clustered), a "
        "deviation over searches for shuffled labels. Difference: the feature minus the neuron, on the same examples. "
        "p: share of searches with labels shuffled within books whose best AUC on the searched half is as high. Labels "
        "shuffled: held-out AUC of what such searches find (and its AUC in the search). Other seeds: the same search "
        "in dictionaries trained from another seed, and the difference to the same neuron. Random directions: a "
        "dictionary of the same size and sparsity that was not trained, and its p."
        f"{numbers.get('corrected', '')}\n\n"
        + report.table(["concept", "a word has it if"], [[name, one["rule"]] for name, one in rules.items()], left=2)
    )  # fmt: skip


if __name__ == "__main__":
    main()
