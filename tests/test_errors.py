"""The closed list of error codes, and errors that survive a trip between processes."""

from __future__ import annotations

import pickle
import re
from typing import get_args

import pytest

from fcos_ray import errors
from fcos_ray.errors import ERROR_CODES, DecodeError, DetectError, FetchError, ImageError, Stage

CLASSES: list[type[ImageError]] = [FetchError, DecodeError, DetectError]


def test_every_code_has_a_stage_and_a_meaning_in_plain_words() -> None:
    for code, (stage, transient, meaning) in ERROR_CODES.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)
        assert stage in get_args(Stage)
        assert isinstance(transient, bool)
        assert len(meaning) >= 10
    assert len({meaning for *_, meaning in ERROR_CODES.values()}) == len(ERROR_CODES)


def test_only_fetching_fails_for_a_while() -> None:
    """Decoding and detecting the same bytes again gives the same; an outage must not look like a bad image."""
    assert {code for code, (_, transient, _) in ERROR_CODES.items() if transient} == {
        "fetch_timeout", "fetch_failed", "store_unavailable",
    }  # fmt: skip


@pytest.mark.parametrize("code", ERROR_CODES)
def test_every_code_belongs_to_one_class_and_survives_pickling(code: str) -> None:
    stage, transient, _ = ERROR_CODES[code]
    for class_ in CLASSES:
        if class_.stage != stage:
            with pytest.raises(AssertionError, match=f"{code} is no {class_.stage} code"):
                class_(code, "why")
            continue
        error = pickle.loads(pickle.dumps(class_(code, "why")))
        assert type(error) is class_
        assert (error.code, error.message, error.transient, str(error)) == (code, "why", transient, f"{code}: why")


def test_an_unknown_code_is_a_bug() -> None:
    with pytest.raises(KeyError):
        FetchError("no_such_code", "why")


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__
    drawn: list[tuple[int, str]] = [
        (m.start(1), m[1]) for m in re.finditer(r"(\w+(?:Error|Stopped|Stalled))\b", errors.__doc__)
    ]
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert {name for _, name in drawn} == classes
    parents: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        if not (found := re.search(r"\w+(?:Error|Stopped|Stalled)\b", line)):
            continue
        parents = [(column, name) for column, name in parents if column < found.start()]
        if parents:
            assert getattr(errors, found[0]).__bases__ == (getattr(errors, parents[-1][1]),)
        parents.append((found.start(), found[0]))
