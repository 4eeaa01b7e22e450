"""The tests of the TransformerLens adapter run where TransformerLens is: `make test-lens` brings it."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("transformer_lens") else ["test_*.py"]

if not collect_ignore_glob:
    from lens_models import MODELS

    @pytest.fixture(params=MODELS)
    def model(request):
        """Each kind of model that this TransformerLens can build."""
        return MODELS[request.param]()


def pytest_configure(config):
    # TransformerLens and what it imports warn of their own affairs; ours stay errors.
    for line in ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:transformer_lens",
                 "ignore:.*native.*:UserWarning", "ignore::SyntaxWarning"):  # fmt: skip
        config.addinivalue_line("filterwarnings", line)
