"""What every refusal must be, and proof that nothing in a file ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from corpus import NET
from harness import Subject, tiny, tiny_images
from terminal import Terminal
from warm import Warm

from seprune.checkpoint import load_weights
from seprune.errors import InputError

Refuse = Callable[..., InputError]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A path that hostile files try to create."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a file was run"


@pytest.fixture
def refuse() -> Refuse:
    """Load a file, demand a refusal in three parts and an untouched file, and return it."""

    def check(path: Path, *, code: str, says: str = "", weights: str = "auto") -> InputError:
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(InputError) as caught:
            load_weights(path, weights=weights)
        error = caught.value
        assert (error.code, error.exit_status) == (code, 3)
        assert str(path) in error.what
        assert error.why
        assert error.fix
        assert says in str(error)
        assert "weights_only" not in str(error)
        assert before is None or path.read_bytes() == before
        return error

    return check


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """The processes that are forked."""
    with closing(Warm()) as started:
        yield started


@pytest.fixture(scope="session")
def terminal(warm: Warm) -> Terminal:
    """The real command line, each command in a process of its own."""
    return Terminal(warm)


@pytest.fixture(scope="session")
def tiny_run(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A run of less than a second, and what it ends with when nothing disturbs it."""
    images = tiny_images(tmp_path_factory.mktemp("images"))
    return Subject.unbroken(warm, tmp_path_factory.mktemp("runs"), tiny(images), images)


@pytest.fixture(scope="session")
def pruned(terminal: Terminal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that `seprune prune` wrote; copies of it are for damaging."""
    out = tmp_path_factory.mktemp("saved") / "small"
    words = (NET, "--data", "digits", "--importance", "l2", "--set", "plan.min_channels=2")
    assert terminal("prune", *words, "--recover", "none", "--out", out).status == 0
    return out
