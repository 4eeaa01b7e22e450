"""The tests of the TransformerLens adapter run where TransformerLens is: `make test-lens` brings it."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("transformer_lens") else ["test_*.py"]

if not collect_ignore_glob:
    from lens_models import MODELS

    from tlfast.transformer_lens.compatibility import registered_hooks

    if registered_hooks() != "full":  # of 2.0.0 to 2.2.1: its own caches are wrong, and nothing to compare with
        collect_ignore_glob = ["test_same_as_theirs.py", "test_acceleration.py"]

    @pytest.fixture(params=MODELS)
    def model(request):
        """Each kind of model that this TransformerLens can build."""
        return MODELS[request.param]()


def pytest_addoption(parser):
    parser.addoption("--every-kind", action="store_true", help="every kind of model, and not only some")


def pytest_configure(config):
    # TransformerLens and what it imports warn of their own affairs; ours stay errors.
    for line in ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:transformer_lens",
                 "ignore:.*native.*:UserWarning", "ignore::SyntaxWarning"):  # fmt: skip
        config.addinivalue_line("filterwarnings", line)
