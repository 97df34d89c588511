"""For all tests."""

import rayrl.cluster  # noqa: F401  # sets what Ray reads when it is imported, before a test imports it
