"""Documents of a source, prepared: without duplicates, cut, shuffled, each with its split."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator

from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.errors import DataError
from sae.numerics.seeding import STREAMS, document_random_1, python_random
from sae.text.census import Census
from sae.text.corpus import is_held_out, read_documents
from sae.text.digests import DigestSet, ReadTexts
from sae.text.document import READING, Chat, Content, Document, LongText, TokenIds, digest_of, is_empty
from sae.text.sections import sections

_CHARACTERS_AT_ONCE = 500_000
_SECTION_OF_ONE_DOCUMENT = 10_000
_CHARACTERS_PER_ID = 4


def prepared_documents(
    config: DataConfig, number: int = 0, streams: int = STREAMS, census: Census | None = None,
    read: ReadTexts | None = None, reading: int = READING,
) -> Iterator[tuple[str, Content, str]]:  # fmt: skip
    """Yield (document's name, content, split) for a source, cut into sections and shuffled as `config` says.

    Empty contents are left out.

    Sections keep the name of their document, so they fall on one side of the held-out split and count as one document
    in standard errors, unless `holdout_by` is `section`: then every section is a document of its own. This is the
    default for a source that is one document.

    If there are several sources, names begin with the source's label. The held-out split ignores the label, so that a
    document is on the same side alone and in every mix.

    Args:
        config: settings of the text.
        number: number of the source.
        streams: version of the random streams that shuffle documents.
        census: counts skipped and special entries.
        read: contents of this and other sources that have been read already; None means none.
        reading: version of how text is read.

    Raises:
        DataError: as `read_documents`; or there is only one document, and documents are to be held out whole.
    """
    source, census = config.sources[number], census or Census()
    documents = read_documents(
        source, split=config.split, subset=config.subset, column=config.column, streaming=config.streaming,
        census=census, revision=config.revision, reading=reading,
    )  # fmt: skip
    prefix = f"{config.labels[number]}/" if len(config.sources) > 1 else ""

    def prepared() -> Iterator[tuple[str, Content, str]]:
        new = _new_documents(documents, census, (read or ReadTexts(reading=reading)) if reading else None)
        first = list(itertools.islice(new, 2))
        if len(first) == 1 and config.holdout_by == "document":
            raise DataError(
                f"data source {source!r}: it holds one document, and a held-out split needs at least two: set "
                "data.holdout_by=section, so that its sections are divided, or add text"
            )
        by_section = config.holdout_by == "section" or (config.holdout_by is None and len(first) == 1)
        census.unit = "section" if by_section else "document"
        characters = config.section_characters or (_SECTION_OF_ONE_DOCUMENT if by_section else None)
        sides = {split: DigestSet() for split in SPLITS}
        for document in itertools.chain(first, new):
            for section, content in enumerate(_cut(document.text, characters)):
                if is_empty(content):
                    continue
                name = f"{document.name}#{section}" if by_section else document.name
                split = HELD_OUT if is_held_out(name, config.holdout_seed, config.holdout_fraction) else TRAIN
                if by_section and isinstance(content, str):
                    digest = digest_of(content)
                    sides[split].add(digest)
                    census.repeated_sections += any(digest in seen for side, seen in sides.items() if side != split)
                yield prefix + name, content, split

    if not config.shuffle_documents:
        return prepared()
    rng = document_random_1() if streams == 1 else python_random("order of documents", number)
    return _shuffled(prepared(), config.shuffle_documents, rng)


def _new_documents(documents: Iterator[Document], census: Census, read: ReadTexts | None) -> Iterator[Document]:
    """Documents that are neither empty nor equal to one read before; skipped ones are counted."""
    for document in documents:
        if is_empty(document.text):
            census.empty += 1
        elif read is not None and not read.add(document.text):
            census.duplicates += 1
        else:
            census.pretokenised += isinstance(document.text, TokenIds)
            census.chats += isinstance(document.text, Chat)
            yield document


def _cut(content: Content, characters: int | None) -> Iterator[Content]:
    """Sections of texts and of lists of ids; chats remain whole."""
    if characters is None or isinstance(content, Chat):
        yield content
    elif isinstance(content, TokenIds):
        step = max(1, characters // _CHARACTERS_PER_ID)
        yield from (TokenIds(content.ids[start : start + step]) for start in range(0, len(content.ids), step))
    else:
        yield from sections(content.pieces() if isinstance(content, LongText) else [content], characters)


def _shuffled(
    items: Iterable[tuple[str, Content, str]], buffer_size: int, rng: random.Random
) -> Iterator[tuple[str, Content, str]]:
    """A streaming shuffle: each item leaves from a random place of the buffer."""
    items = iter(items)
    buffer = list(itertools.islice(items, buffer_size))
    for item in items:
        place = rng.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = item
    rng.shuffle(buffer)
    yield from buffer


def take_characters(documents: Iterator[tuple[str, Content, str]]) -> Iterator[tuple[str, Content, str]]:
    """Take documents with about half a million characters in total; a text read in pieces is the last one."""
    count = 0
    for document in documents:
        yield document
        count += _size(document[1])
        if count >= _CHARACTERS_AT_ONCE:
            return


def _size(content: Content) -> int:
    if isinstance(content, Chat):
        return content.characters
    if isinstance(content, TokenIds):
        return len(content.ids)
    return _CHARACTERS_AT_ONCE if isinstance(content, LongText) else len(content)
