"""bench/decode/before_after.py: what it makes of the seconds and texts of two checkouts."""

import pytest

from bench.decode import before_after


class Checkout:
    """Takes 9 seconds for the first call, then as long as told; keeps the order of calls in `order`."""

    def __init__(self, name, order, seconds, text):
        self.name, self.order, self.seconds, self.text = name, order, iter([9.0, *seconds]), text

    def decode(self, case):
        self.order.append(self.name)
        return {"seconds": next(self.seconds), "texts": [self.text, self.text]}


@pytest.mark.parametrize("text", [[1, 2], [1, 3]])
def test_a_row_has_the_medians_and_the_checkouts_take_turns(text):
    order: list[str] = []
    before = Checkout("before", order, [4.0, 2.0, 2.0], [1, 2])
    after = Checkout("after", order, [1.0, 1.0, 8.0], text)
    row = before_after.compare("embedded plain", [before, after], turns=3)
    assert order == ["before", "after", "before", "after", "after", "before", "before", "after"]
    tokens = 2 * before_after.NEW_TOKENS
    assert (row["before, tok/s"], row["after, tok/s"]) == (tokens / 2, tokens)
    assert (row["after / before"], row["middle half"]) == (2, "0.25 to 4.00")
    assert (row["first call before, s"], row["after, s"]) == (9, 9)
    assert row["same texts"] == (text == [1, 2])
