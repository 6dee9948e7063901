"""The models of tests/model, and parameters to start from."""

from tests.model.conftest import named, start  # noqa: F401
