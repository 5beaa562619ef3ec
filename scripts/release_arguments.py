"""Arguments and output fields of two releases of transformers: what was renamed, dropped, moved, or put in the way."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from release_sources import Class, Parameter, Release, Signature
from touched_names import Touched

FORWARDS = ("attention", "layers", "models", "others")  # kinds of classes whose forwards are compared
PLAIN = re.compile(r"\b(Tensor|bool|int|float|str)\b|^$")  # annotations that tell no argument from another


@dataclass
class Names:
    """In which places a name was renamed, dropped or added: kind -> where."""

    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, where: str) -> None:
        """Counts a place."""
        self.places[kind].append(where)

    def total(self) -> int:
        """The number of places."""
        return sum(map(len, self.places.values()))

    def __str__(self) -> str:
        if self.total() == 1:
            return next(where for found in self.places.values() for where in found)
        counts = {kind: len(found) for kind, found in self.places.items()}
        forwards = {kind: counts.pop(kind) for kind in FORWARDS if kind in counts}
        kinds = ", ".join(f"{kind} {count}" for kind, count in forwards.items())
        words = [f"{sum(forwards.values())} forwards ({kinds})"] if forwards else []
        return ", ".join(words + [f"{count} {kind}" for kind, count in sorted(counts.items())])


@dataclass
class Arguments:
    """Arguments and output fields, over all forwards, output classes and functions."""

    renamed: dict[tuple[str, str], Names]
    gone: dict[str, Names]
    new: dict[str, Names]  # only those without a default, or in front of an older one
    moved: dict[str, Names]


@dataclass(frozen=True)
class Place:
    """A signature or a list of fields that both releases have."""

    kind: str
    where: str
    old: Signature
    new: Signature

    @property
    def gone(self) -> list[Parameter]:
        """Parameters that the new release does not have by this name."""
        names = {each.name for each in self.new}
        return [each for each in self.old if each.name not in names]

    @property
    def added(self) -> list[Parameter]:
        """Parameters that the old release did not have by this name."""
        names = {each.name for each in self.old}
        return [each for each in self.new if each.name not in names]


def places(old: Release, new: Release) -> Iterator[Place]:
    """Every forward, output class, function and method that both releases have."""
    for module, before in old.modules.items():
        after = new.modules.get(module)
        if after is None:
            continue
        name = module.split(".")[-1]
        for each in before.functions.keys() & after.functions.keys():
            yield Place("functions", f"{name}.{each}", before.functions[each], after.functions[each])
        for each in before.classes.keys() & after.classes.keys():
            ours, theirs = before.classes[each], after.classes[each]
            if "Output" in each:
                yield Place("output classes", f"{name}.{each}", _fields(old, ours), _fields(new, theirs))
            for method in ours.methods.keys() & theirs.methods.keys():
                kind = kind_of(ours) if method == "forward" else "functions"
                yield Place(kind, f"{name}.{each}.{method}", ours.methods[method], theirs.methods[method])


def _fields(release: Release, found: Class) -> Signature:
    fields: dict[str, Parameter] = {}
    for each in reversed(release.line(found)):
        fields |= each.fields
    return tuple(fields.values())


def kind_of(found: Class) -> str:
    """What a class is: "attention", "layers", "models" or "others"."""
    if "Attention" in found.name or found.passed:
        return "attention"
    if found.name.endswith(("Layer", "Block")):
        return "layers"
    return "models" if any("PreTrainedModel" in base for base in found.bases) else "others"


def arguments(found: Iterable[Place], touched: Touched) -> Arguments:
    """What has another name of the same annotation, what is gone, what is new and in the way, what moved.

    Of functions only those that we name are looked at for the last three.
    """
    differing = [place for place in found if place.old != place.new]
    known = Counter(
        (place.gone[0].name, place.added[0].name)
        for place in differing
        if len(place.gone) == len(place.added) == 1 and place.gone[0].annotation == place.added[0].annotation
    )
    result = Arguments(*(defaultdict(Names) for _ in range(4)))
    for place in differing:
        renamed = _renamed(place, known)
        for pair in renamed.items():
            result.renamed[pair].add(place.kind, place.where)
        if place.kind != "functions" or place.where.split(".")[-1] in touched.words:
            for each in place.gone:
                if each.name not in renamed:
                    result.gone[each.name].add(place.kind, place.where)
            _order(place, renamed, result)
    return result


def _renamed(place: Place, known: Counter[tuple[str, str]]) -> dict[str, str]:
    """Old name -> new name: as elsewhere, or the only two of an annotation that says something."""
    pairs: dict[str, str] = {}
    for gone in place.gone:
        left = [each for each in place.added if each.name not in pairs.values()]
        count, name = max(((known[gone.name, each.name], each.name) for each in left), default=(0, ""))
        alike = [each.name for each in left if each.annotation == gone.annotation and not PLAIN.search(gone.annotation)]
        if count or len(alike) == 1:
            pairs[gone.name] = name if count else alike[0]
    return pairs


def _order(place: Place, renamed: dict[str, str], result: Arguments) -> None:
    """New arguments that are required or stand before older ones, and older ones in another order."""
    before = [renamed.get(each.name, each.name) for each in place.old]
    after = [each.name for each in place.new]
    kept = [name for name in after if name in before]
    last = max((after.index(name) for name in kept if not name.startswith("*")), default=-1)
    for index, each in enumerate(place.new):
        if each.name not in before and not each.name.startswith("*"):
            if index < last or (each.default is None and place.kind != "output classes"):
                result.new[each.name].add(place.kind, place.where)
    for name, other in zip(kept, [name for name in before if name in kept], strict=True):
        if name != other:
            result.moved[name].add(place.kind, place.where)


def describe(before: Signature, after: Signature) -> str:
    """What differs between two signatures, in words of one line; "" where nothing does."""
    place = Place("", "", before, after)
    gone, added = [str(each) for each in place.gone], [str(each) for each in place.added]
    if len(gone) == len(added) == 1:
        return f"{gone[0]} -> {added[0]}"
    words = [f"-{each}" for each in gone] + [f"+{each}" for each in added]
    defaults = {each.name: str(each) for each in before}
    words += [f"{defaults[each.name]} -> {each}" for each in after if defaults.get(each.name, str(each)) != str(each)]
    if not words and [each.name for each in before] != [each.name for each in after]:
        words = [f"order: {', '.join(each.name for each in after)}"]
    return ", ".join(words)
