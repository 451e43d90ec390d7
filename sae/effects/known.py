"""Effects known so far: those that a run folder has already, and those added to them; saved now and then."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from sae.effects.effects import Effects, FeatureEffect
from sae.effects.interventions import Changes
from sae.effects.store import resume, save_effects, stem, write_effects
from sae.effects.summarise import over_features, over_positions
from sae.files.writing import stands

_SECONDS_BETWEEN_SAVES, _SAVES_SHARE = 10.0, 0.05


class Known:
    """Effects of features, and the changes that they are made from.

    Args:
        blank: effects of no feature, with all that says what they are of.
        folder: the run folder; what is there with the same key is taken over. None: nothing is kept.
    """

    def __init__(self, blank: Effects, folder: Path | None) -> None:
        self.folder, self._last = folder, time.perf_counter()
        self._took = 0.0
        found = None if folder is None else resume(folder, blank.key, blank.settings.scale)
        self._blank, self._parts = (blank, []) if found is None else (found[0], [found[1]])
        self.features = dict(self._blank.features)

    def add_(self, effects: dict[int, FeatureEffect], changes: Changes, tokens: int) -> None:
        """Take in features; saves them if it is time, which saving never takes more than a small share of.

        Args:
            effects: by feature.
            changes: all that they are made from.
            tokens: held-out tokens that firings were looked for in.
        """
        self.features |= effects
        self._parts.append(changes)
        self._blank = dataclasses.replace(self._blank, tokens=tokens)
        if time.perf_counter() - self._last > max(_SECONDS_BETWEEN_SAVES, self._took / _SAVES_SHARE):
            self.save()

    def save(self) -> None:
        """Write what is needed to go on, where there is a folder."""
        if self.folder is not None:
            started = time.perf_counter()
            save_effects(self.effects(), self._changes(), self.folder)
            self._last = time.perf_counter()
            self._took = self._last - started

    def is_written(self) -> bool:
        """Whether what is for people is there as well; a kill may have come before it."""
        return self.folder is None or stands(self.folder / f"{stem(self._blank.settings.scale)}.md")

    def write(self) -> Effects:
        """All of them, written with what is for people where there is a folder."""
        effects = self.effects()
        if self.folder is not None:
            write_effects(effects, self._changes(), self.folder)
        return effects

    def effects(self) -> Effects:
        """All of them as a result, with their correlations."""
        effects = [self.features[feature] for feature in sorted(self.features)]
        seed = self._blank.settings.seed
        return dataclasses.replace(
            self._blank,
            features={effect.feature: effect for effect in effects},
            over_features=over_features(effects, seed),
            over_positions=over_positions(self._changes(), seed),
        )

    def _changes(self) -> Changes:
        self._parts = [Changes.joined(self._parts)]
        return self._parts[0]
