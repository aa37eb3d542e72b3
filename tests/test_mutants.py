"""The planted faults: each is still one, so that the list of them cannot rot."""

from __future__ import annotations

import ast
import shlex
from collections import Counter

import pytest
from house import ROOT, tool

FAULTS = tool("mutants").faults()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_planted_fault_is_one(fault) -> None:
    code = (ROOT / fault.file).read_text()
    assert code.count(fault.text) == 1
    wrong = code.replace(fault.text, fault.becomes)
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(code))


def test_faults_have_names_of_their_own_and_tests_that_exist() -> None:
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1
    for fault in FAULTS:
        files = [word for word in shlex.split(fault.tests) if word.endswith(".py")]
        assert files, fault.name
        assert all((ROOT / name).is_file() for name in files), fault.name


def test_every_module_of_the_two_lower_floors_has_faults() -> None:
    counts = Counter(fault.module for fault in FAULTS)
    assert min(counts.values()) >= 10
    assert len(counts) >= 24
