import numpy as np
import pytest

from slm.data.splits import check_disjoint, content_hash, take_side
from slm.errors import DataError

TEXTS = [f"document {i % 150}" for i in range(200)]  # 50 of them twice


def side(which, how="document", fraction=0.3, texts=TEXTS):
    return list(take_side(lambda: iter(texts), which, how, fraction))


def hashes(texts):
    return np.array([content_hash(text) for text in texts], np.uint64)


def test_document_split_puts_copies_on_one_side():
    train, validation = side("train"), side("validation")
    assert sorted(train + validation) == sorted(TEXTS)
    assert not set(train) & set(validation)
    assert 0.15 < len(validation) / len(TEXTS) < 0.45
    assert side("all") == TEXTS


def test_document_split_depends_on_the_text_alone():
    assert set(side("validation", texts=TEXTS[::-1])) == set(side("validation"))
    assert set(side("validation", fraction=0.2)) < set(side("validation"))


@pytest.mark.parametrize("n", [10, 17, 1_003])
def test_tail_of_one_file_is_nanogpts_split(n):
    text = "".join(chr(ord("a") + i % 26) for i in range(n))
    assert side("train", "tail", 0.1, [text]) == [text[: int(n * 0.9)]]
    assert side("validation", "tail", 0.1, [text]) == [text[int(n * 0.9) :]]


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.6, 0.95])
def test_tail_of_several_documents_cuts_the_stream(fraction):
    texts = ["aaaa", "bbbbbb", "cccccccccc"]
    train, validation = (side(which, "tail", fraction, texts) for which in ("train", "validation"))
    assert "".join(train + validation) == "".join(texts)
    assert len("".join(train)) == int(20 * (1 - fraction))
    assert all(train + validation)


def test_overlap_is_counted_and_refused():
    check_disjoint([hashes(["a", "b"]), hashes(["c"])], [hashes(["d"]), hashes(["e"])])
    with pytest.raises(DataError, match="2 of 3 validation documents are also in the training data"):
        check_disjoint([hashes(["a", "b"]), hashes(["c"])], [hashes(["d", "c"]), hashes(["a", "a"])])
