"""What is weaker than it should be, each with its reason: the tests state the behaviour wanted and must fail until then.

A test that starts to pass fails the suite (strict), so that its row is deleted.
"""

from __future__ import annotations

KNOWN_GAPS = {
    # An input is written once, at the end, with its last version. What eager has written when operation k fails is an
    # earlier version, which the plan may have freed or never made: dead code removal drops a version that the next write
    # covers. Doing as eager does needs the versions kept alive up to the next operation that can fail.
}  # fmt: skip
