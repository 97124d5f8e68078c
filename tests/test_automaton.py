"""Globs that are looked for all at once, against regular expressions."""

import random
import re

import pytest

from lrmult import _patterns
from lrmult._automaton import Automaton
from lrmult._errors import LrmultError
from lrmult._patterns import Glob, Names, Pattern, parse


@pytest.mark.parametrize("letters", ["ab", "abc\0", "aé\U0001f600b", "a_01239w"])
def test_the_names_that_globs_wait_for(letters):
    rng = random.Random(0)

    def word(most):
        return "".join(rng.choice(letters) for _ in range(rng.randint(0, most)))

    for _ in range(300):
        names = [word(7) for _ in range(rng.randint(0, 30))]
        globs = [tuple(word(5) for _ in range(rng.randint(2, 4))) for _ in range(rng.randint(1, 9))]
        automaton = Automaton([Pattern((Names((parts,)),)) for parts in globs])
        wanted = {}
        for rule, parts in enumerate(globs):
            regex = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
            for name in set(names):
                matches = regex.fullmatch(name) is not None
                assert Glob(parts).match(name) == matches
                if matches:
                    wanted[name] = wanted.get(name, 0) | automaton.accepting[rule] >> 1
        assert automaton.expecting(names) == wanted


def test_texts_of_names_stars_and_choices_are_read_as_others_are(monkeypatch):
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab*/{},[]\\0:\n**//", k=rng.randint(0, 9))) for _ in range(9000)]
    for _ in range(9000):
        before, after, *names = ("".join(rng.choices("ab*", k=rng.randint(0, 3))) for _ in range(6))
        choice = before + "{" + ",".join(names[: rng.randint(1, 4)]) + "}" + after
        line = [choice, *rng.choices(["a", "*b", "**", "{a,*}", "{", "}b", "c,d"], k=2)]
        texts.append("/".join(rng.sample(line, rng.randint(1, 3))))
    texts += ["{" + "a," * count + "}" for count in (998, 999, 1000)]

    def read(text):
        try:
            return parse.__wrapped__(text)
        except LrmultError as error:
            return type(error), str(error)

    at_once = [read(text) for text in texts]
    assert sum(_patterns._MARKED.search(text) is None and "{" in text for text in texts) > 5000
    monkeypatch.setattr(_patterns, "_MARKED", re.compile(""))
    assert at_once == [read(text) for text in texts]
