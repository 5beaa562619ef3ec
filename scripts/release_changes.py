"""What else changed between two releases of transformers of what hf_attnpatch touches, beside arguments."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from release_arguments import Names, describe, kind_of
from release_sources import Class, Release, Signature
from touched_names import Touched

TABLES = {"CONFIG": "configs", "MODEL_FOR_CAUSAL_LM": "causal LM", "MODEL_FOR_MASKED_LM": "masked LM"}


def imports(old: Release, new: Release, touched: Touched) -> Iterator[tuple[str, str]]:
    """What we import that is gone, moved or has another signature or other members that we name."""
    seen: set[str] = set()
    for module, name in sorted(touched.imports):
        label = f"{module}.{name}".strip(".")
        if not old.has(module, name) and not new.has(module, name):
            continue  # for another release: the import is guarded
        if not new.has(module, name):
            homes = [where for where, each in new.modules.items() if name in each.functions or name in each.classes]
            yield label, f"GONE{'; now in ' + ', '.join(homes[:3]) if homes else ''}"
        elif not old.has(module, name):
            yield label, "new"
        else:
            yield from _imported(label, old, new, module, name, touched, seen)


def _imported(
    label: str, old: Release, new: Release, module: str, name: str, touched: Touched, seen: set[str]
) -> Iterator[tuple[str, str]]:
    before, after = old.find(module, name), new.find(module, name)
    if isinstance(before, tuple) and isinstance(after, tuple):
        words = describe(before, after)
        if words:
            yield f"{label}()", words
    elif isinstance(before, Class) and isinstance(after, Class):
        for each, words in _members(old, new, before, after, {*touched.words, "__init__"}):
            if each not in seen:
                seen.add(each)
                yield each, words
    elif type(before) is not type(after):
        yield label, "no longer the same kind of thing (function, class or value)"


def _members(old: Release, new: Release, before: Class, after: Class, wanted: set[str]) -> Iterator[tuple[str, str]]:
    ours, theirs = _all_members(old, before), _all_members(new, after)
    for member in sorted(wanted & ours.keys()):
        home, signature = ours[member]
        if member not in theirs:
            yield f"{home}.{member}", "GONE"
        elif isinstance(signature, tuple) and isinstance(theirs[member][1], tuple):
            words = describe(signature, theirs[member][1])
            if words:
                yield f"{home}.{member}()", words


def _all_members(release: Release, found: Class) -> dict[str, tuple[str, Signature | None]]:
    members: dict[str, tuple[str, Signature | None]] = {}
    for each in reversed(release.line(found)):
        members |= {name: (each.name, None) for name in each.attributes | each.fields.keys()}
        members |= {name: (each.name, signature) for name, signature in each.methods.items()}
    return members


def private(old: Release, new: Release, touched: Touched) -> Iterator[tuple[str, str]]:
    """Private names that we use which no class or module has any more."""
    before, after = _defined(old), _defined(new)
    for name in touched.private:
        if name in before and name not in after:
            yield name, f"GONE; it was in {before[name]}"


def _defined(release: Release) -> dict[str, str]:
    found: dict[str, str] = {}
    for module, each in release.modules.items():
        found |= {name: module for name in each.functions}
    for module, each in release.classes():
        found |= {name: f"{module}.{each.name}" for name in (*each.methods, *each.fields, *each.attributes)}
    return found


def attributes(old: Release, new: Release) -> tuple[dict[str, Names], dict[str, Names]]:
    """What attention modules set on themselves: names that are gone, and new ones."""
    pairs = [pair for pair in _classes(old, new) if kind_of(pair[1]) == "attention"]
    return _differences((where, before.attributes, after.attributes) for where, before, after in pairs)


def passed(old: Release, new: Release) -> tuple[dict[str, Names], dict[str, Names]]:
    """Keywords that classes, and mask functions, pass to what is registered: gone ones, new ones."""
    pairs = [(where, before.passed, after.passed) for where, before, after in _classes(old, new)]
    both = old.modules.keys() & new.modules.keys()
    return _differences([*pairs, *((name, old.modules[name].passed, new.modules[name].passed) for name in both)])


def _classes(old: Release, new: Release) -> Iterator[tuple[str, Class, Class]]:
    for module, before in old.classes():
        after = new.modules[module].classes.get(before.name) if module in new.modules else None
        if after is not None:
            yield f"{module.split('.')[-1]}.{before.name}", before, after


def _differences(found: Iterable[tuple[str, set[str], set[str]]]) -> tuple[dict[str, Names], dict[str, Names]]:
    gone: dict[str, Names] = defaultdict(Names)
    added: dict[str, Names] = defaultdict(Names)
    for where, before, after in found:
        for result, names in ((gone, before - after), (added, after - before)):
            for name in sorted(names):
                result[name].add("places", where)
    return gone, added


def caches(old: Release, new: Release) -> Iterator[tuple[str, str]]:
    """Methods of cache classes: gone, new, of another signature."""
    before, after = (release.modules.get("cache_utils") for release in (old, new))
    if before is None or after is None:
        yield "cache_utils", "GONE"
        return
    for name in sorted(before.classes.keys() | after.classes.keys()):
        if name not in after.classes:
            yield name, "GONE"
        elif name not in before.classes:
            yield name, "new"
        else:
            ours, theirs = before.classes[name].methods, after.classes[name].methods
            for method in sorted(ours.keys() | theirs.keys()):
                word = "GONE" if method not in theirs else "new" if method not in ours else ""
                word = word or describe(ours[method], theirs[method])
                if word:
                    yield f"{name}.{method}", word


def lost_classes(old: Release, new: Release) -> dict[str, list[str]]:
    """Attention modules and models of the families that are gone by their names: family -> names."""
    found: dict[str, list[str]] = defaultdict(list)
    for module, each in old.classes():
        there = module in new.modules and each.name in new.modules[module].classes
        if module.startswith("models.") and not there and kind_of(each) in ("attention", "models"):
            found[module.split(".")[1]].append(each.name)
    return dict(found)


def model_types(old: Release, new: Release) -> Iterator[tuple[str, list[str], list[str]]]:
    """For each of three Auto tables: model types that are lost, and new ones."""
    for table, label in TABLES.items():
        before, after = (_table(release, f"{table}_MAPPING_NAMES") for release in (old, new))
        yield label, sorted(before - after), sorted(after - before)


def _table(release: Release, name: str) -> set[str]:
    return set().union(*(each.tables.get(name, set()) for each in release.modules.values()))


def deprecated(old: Release, new: Release, touched: Touched) -> dict[str, tuple[int, str]]:
    """Names that we use and the new release alone calls deprecated: in how many places, and what it says."""
    before = {name for module in old.modules.values() for name, _ in module.deprecated}
    after: Counter[tuple[str, str]] = Counter()
    for module in new.modules.values():
        after.update(module.deprecated)
    found: dict[str, tuple[int, str]] = {}
    for (name, words), count in after.most_common():
        if name not in before and name in touched.words:
            total, first = found.get(name, (0, words))
            found[name] = (total + count, first)
    return found
