"""The tests. What their shared modules assert is explained as in the tests themselves."""

import pytest

pytest.register_assert_rewrite("tests.house", "tests.paying", "tests.renting", "tests.visiting")
