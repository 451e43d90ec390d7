"""Effects known so far: those already in a run folder plus those added since; saved periodically."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from sae.effects.effects import Effects, FeatureEffect, stem
from sae.effects.interventions import NO_CHANGES, Changes
from sae.effects.store import resume, save_effects, write_effects
from sae.effects.summarise import over_features, over_positions
from sae.files.writing import stands

_SECONDS_BETWEEN_SAVES, _SAVES_SHARE = 10.0, 0.05


class Known:
    """Effects of features and the changes they are computed from.

    Args:
        blank: effects without features, with settings, identities and key filled in.
        folder: the run folder; results in it with the same key are reused. None: nothing is saved.
    """

    def __init__(self, blank: Effects, folder: Path | None) -> None:
        self.folder, self._last = folder, time.perf_counter()
        self._took = 0.0
        previous = None if folder is None else resume(folder, blank.key, blank.settings.scale)
        self._blank, changes = previous or (blank, NO_CHANGES)
        self._parts = [changes]
        self.features = dict(self._blank.features)

    def add_(self, effects: dict[int, FeatureEffect], changes: Changes, tokens: int) -> None:
        """Add features, and save if enough time has passed that saving takes only a small share of it.

        Args:
            effects: effects by feature.
            changes: all changes they are computed from.
            tokens: number of held-out tokens searched for firings.
        """
        self.features |= effects
        self._parts.append(changes)
        self._blank = dataclasses.replace(self._blank, tokens=tokens)
        if time.perf_counter() - self._last > max(_SECONDS_BETWEEN_SAVES, self._took / _SAVES_SHARE):
            self.save()

    def save(self) -> None:
        """Write what is needed to continue later, if there is a folder."""
        if self.folder is not None:
            started = time.perf_counter()
            save_effects(self.effects(), self._changes(), self.folder)
            self._last = time.perf_counter()
            self._took = self._last - started

    def is_written(self) -> bool:
        """Whether the Markdown is written as well; the process may have been killed before it was."""
        return self.folder is None or stands(self.folder / f"{stem(self._blank.settings.scale)}.md")

    def write(self) -> Effects:
        """All effects; if there is a folder, they are written to it with Markdown and figure."""
        effects = self.effects()
        if self.folder is not None:
            write_effects(effects, self._changes(), self.folder)
        return effects

    def effects(self) -> Effects:
        """All effects as a result, with their correlations."""
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
