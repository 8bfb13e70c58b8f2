"""Every short name passes the suite that every backend of quantmill passes."""

from quantmill.testing import MethodConformance


class TestExample4(MethodConformance):
    method = "example-4"


class TestExample8(MethodConformance):
    method = "example-8"
    max_error = 0.01


class TestSmallSymmetricGroups(MethodConformance):
    # Settings off the beaten path deserve it most.
    method = "example-4:group_size=24,symmetric=true"
