"""Gate statistics against numpy, split every way, on one process and on several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import dependent
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from seprune.errors import EnvironmentFault, InputError
from seprune.graph.groups import find_structure
from seprune.statistics import CollectOptions, GateStatistics, collect_statistics
from seprune.statistics.accumulate import Observed, merge, new_state, summarise, update
from seprune.statistics.columns import BINS, ColumnLayout, midranks
from seprune.statistics.gate_gradients import image_keys, normal, uniform

CLASSES = 5


class SE(nn.Module):
    def __init__(self, channels: int, act: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4), nn.Linear(4, channels)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        s = self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))
        return x * self.act(3 * s)[:, :, None, None]


class Net(nn.Module):
    """An inner gate, a residual gate, and two outputs that are overwritten in place."""

    def __init__(self, act: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.hard = nn.Hardswish(inplace=True)
        self.se1 = SE(12, act)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.se2 = SE(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.stem(x))
        y = self.se1(self.hard(self.bn1(self.conv1(x))))
        x = x + self.se2(self.conv2(y))
        return self.head(torch.relu(x).mean((2, 3)))


class Gateless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net().double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return net


def images(count: int = 41) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, CLASSES, (count,), generator=generator))


def loader(count: int = 41, batch_size: int = 8) -> DataLoader:
    return DataLoader(images(count), batch_size=batch_size)


@torch.no_grad()
def by_hand(model: Net, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The gate of se1 (N, 12) and the mean square of what it scales."""
    model.eval()
    features = model.hard(model.bn1(model.conv1(torch.relu(model.stem(x)))))
    gated = model.se1(features)
    at = features.flatten(2).abs().argmax(2, keepdim=True)
    gate = (gated.flatten(2).gather(2, at) / features.flatten(2).gather(2, at))[:, :, 0]
    return gate.numpy(), features.square().mean((2, 3)).numpy()


def same(a: GateStatistics, b: GateStatistics, *, tolerance: float = 1e-10) -> None:
    assert a.samples == b.samples
    for kind in ("values", "units", "groups"):
        left, right = getattr(a, kind), getattr(b, kind)
        assert left.keys() == right.keys()
        for name, own in left.items():
            assert own.keys() == right[name].keys()
            for key, value in own.items():
                torch.testing.assert_close(
                    value, right[name][key], rtol=tolerance, atol=1e-13, msg=f"{name} {key}"
                )


# -- one statistic after another ----------------------------------------------------------------


def test_equals_numpy(model: Net) -> None:
    x, y = images().tensors
    got = collect_statistics(model, loader())
    gate, energy = by_hand(model, x)
    own = {k: v.numpy() for k, v in got.values["se1"].items()}
    expected = {
        "count": np.full(12, 41.0),
        "mean": gate.mean(0),
        "variance": gate.var(0),
        "minimum": gate.min(0),
        "maximum": gate.max(0),
        "low": (gate < 0.05).mean(0),
        "high": (gate > 0.95).mean(0),
        "energy_before": energy.mean(0),
        "energy_after": (gate**2 * energy).mean(0),
    }
    for key, value in expected.items():
        np.testing.assert_allclose(own[key], value, rtol=1e-12, atol=1e-15, err_msg=key)
    labels = y.numpy()
    means = np.stack([gate[labels == k].mean(0) for k in range(CLASSES)])
    counts = np.bincount(labels, minlength=CLASSES)
    between = (counts[:, None] * (means - gate.mean(0)) ** 2).sum(0) / 41
    np.testing.assert_allclose(own["class_mean"], means, rtol=1e-12)
    np.testing.assert_array_equal(own["class_count"], counts)
    np.testing.assert_allclose(own["between_class"], between, rtol=1e-11)
    np.testing.assert_allclose(own["within_class"], gate.var(0) - between, rtol=1e-11)


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.ReLU, nn.Softplus])
def test_quantiles_are_within_the_stated_error(act: type[nn.Module]) -> None:
    torch.manual_seed(3)
    net = Net(act).double()
    own = collect_statistics(net, loader()).values["se1"]
    gate, _ = by_hand(net, images().tensors[0])
    for key, q in (("q01", 0.01), ("q05", 0.05), ("q25", 0.25), ("q50", 0.5), ("q95", 0.95)):
        exact = np.quantile(gate, q, axis=0, method="inverted_cdf")
        assert (np.abs(own[key].numpy() - exact) <= own["quantile_error"].numpy() + 1e-12).all()
    if act is nn.Sigmoid:
        assert float(own["quantile_error"].max()) <= 1 / BINS + 1e-12


def test_midranks_share_ties_within_each_gate() -> None:
    layout = ColumnLayout(("a", "b"), (4, 3), ("sigmoid",) * 2, 0, torch.device("cpu"))
    x = torch.tensor([[0.5, 0.1, 0.5, 0.9, 0.0, -0.0, 1.0], [0.3, 0.3, 0.3, 0.3, 0.1, 0.2, 0.3]])
    expected = [[2.5, 1, 2.5, 4, 1.5, 1.5, 3], [2.5, 2.5, 2.5, 2.5, 1, 2, 3]]
    assert midranks(layout, x.double()).tolist() == expected


def test_rank_agreement_is_kendalls_w() -> None:
    layout = ColumnLayout(("a", "b"), (3, 3), ("sigmoid",) * 2, 0, torch.device("cpu"))
    x = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.3, 0.2, 0.1]]).double()
    state = new_state(layout)
    update(state, layout, Observed((0, 1), x, x, None, 0))
    agree, disagree = (own["rank_agreement"].item() for own in summarise(state, layout))
    assert (agree, disagree) == (1.0, 0.0)
    # Kendall's own example of the formula: W = 12 S / (m^2 (n^3 - n)), ranks 1..3 three times
    more = torch.tensor([[0.1, 0.3, 0.2, 0.1, 0.1, 0.1]]).double()
    update(state, layout, Observed((0, 1), more, more, None, 1))
    ranks = np.array([[1, 2, 3], [1, 2, 3], [1, 3, 2]]).sum(0)
    w = 12 * ((ranks - ranks.mean()) ** 2).sum() / (9 * (27 - 3))
    own = summarise(state, layout)[0]
    assert own["rank_agreement"].item() == pytest.approx(w, rel=1e-14)
    np.testing.assert_allclose(own["rank"], (ranks / 3 - 0.5) / 3, rtol=1e-14)


# -- any split ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["none", "labels", "smoothed", "sampled", "logits"])
def test_batches_and_order_change_nothing(model: Net, gradients: str) -> None:
    options = CollectOptions(units=("conv1",) if gradients != "none" else ())
    want = collect_statistics(model, loader(), gradients=gradients, options=options)
    x, y = images().tensors
    shuffled = torch.randperm(41, generator=torch.Generator().manual_seed(5))
    other = TensorDataset(x[shuffled], y[shuffled])
    for again in (*(loader(batch_size=b) for b in (1, 2, 7, 64)), DataLoader(other, batch_size=8)):
        same(collect_statistics(model, again, gradients=gradients, options=options), want)


def test_merged_shards_equal_one_run() -> None:
    layout = ColumnLayout(("a", "b"), (5, 7), ("sigmoid", "tanh"), 3, torch.device("cpu"))
    torch.manual_seed(0)
    x, y = torch.rand(30, 12).double(), torch.randint(0, 3, (30,))
    x[:, 0] = 0.999 + 1e-9 * torch.rand(30)  # the mean swamps the variance

    def state(rows: slice) -> dict[str, Tensor]:
        found = new_state(layout)
        update(found, layout, Observed((0, 1), x[rows], x[rows] + 1, y[rows], 0))
        return found

    whole = state(slice(None))
    parts = [state(slice(0, 4)), new_state(layout), state(slice(4, 5)), state(slice(5, None))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    for key, value in whole.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-10, atol=1e-30, msg=key)
    np.testing.assert_allclose(whole["m2"] / 30, x.numpy().var(0), rtol=1e-12)


def test_gates_that_run_in_different_calls_are_each_counted() -> None:
    layout = ColumnLayout(
        ("a", "b", "c"), (2, 3, 4), ("sigmoid", "relu", "sigmoid"), 3, torch.device("cpu")
    )
    x, y = torch.rand(10, 9).double(), torch.arange(10) % 3
    whole, apart = new_state(layout), new_state(layout)
    update(whole, layout, Observed((0, 1, 2), x, x, y, 0))
    some = torch.cat([x[:, :2], x[:, 5:]], 1)
    update(apart, layout, Observed((0, 2), some, some, y, 0))
    update(apart, layout, Observed((1,), x[:, 2:5], x[:, 2:5], y, 0))
    for key, value in whole.items():
        torch.testing.assert_close(apart[key], value, rtol=1e-12, atol=1e-15, msg=key)


_WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_statistics import Net, loader
from seprune.errors import SepruneError
from seprune.statistics import CollectOptions, collect_statistics
from pathlib import Path
import torch.distributed as dist
torch.manual_seed(0); torch.set_num_threads(1)
data = loader(int(sys.argv[3]), 6)
if len(sys.argv) > 4:
    class Bad:
        def __iter__(self, data=data):
            import os
            for i, batch in enumerate(data):
                if i == 1 and os.environ["RANK"] == "1": raise ValueError("disk on fire")
                yield batch
    data = Bad()
try:
    found = collect_statistics(
        Net().double(), data, gradients="logits", options=CollectOptions(units=("conv1",))
    )
    if not dist.is_initialized() or dist.get_rank() == 0: found.save(Path(sys.argv[2]))
except SepruneError as error:
    sys.exit(str(error))
finally:  # gloo's threads abort the interpreter now and then if they outlive it
    if dist.is_initialized(): dist.destroy_process_group()
"""


def _torchrun(tmp_path: Path, processes: int, *arguments: str) -> list[subprocess.CompletedProcess]:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    tests, root = Path(__file__).parents[1], Path(__file__).parents[2]
    common = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common |= {"MASTER_PORT": str(free.getsockname()[1]), "PYTHONPATH": str(root)}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(tests), *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    return [
        subprocess.CompletedProcess(p.args, p.wait(timeout=200), stderr=p.communicate()[1])
        for p in started
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "count"), [(1, 41), (2, 41), (3, 41), (3, 2)])
def test_processes_equal_one(tmp_path: Path, processes: int, count: int) -> None:
    done = _torchrun(tmp_path, processes, str(tmp_path / "s.safetensors"), str(count))
    assert [p.returncode for p in done] == [0] * processes, [p.stderr[-800:] for p in done]
    torch.manual_seed(0)
    want = collect_statistics(
        Net().double(),
        loader(count, 6),
        gradients="logits",
        options=CollectOptions(units=("conv1",)),
    )
    same(GateStatistics.load(tmp_path / "s.safetensors"), want)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    done = _torchrun(tmp_path, 2, str(tmp_path / "s.safetensors"), "41", "fail")
    assert [p.returncode for p in done] == [1, 1], [p.stderr[-2000:] for p in done]
    assert "process 1 of 2: ValueError: disk on fire" in done[0].stderr


# -- derivatives --------------------------------------------------------------------------------


def masked_u(model: Net, x: Tensor, z_of, place: str) -> Tensor:
    """u (N, C) with a mask of ones after the gated map of `place`, one image at a time."""
    rows = []
    for i in range(len(x)):
        channels = {"se1": 12, "se2": 8, "stem": 8, "bn1": 12}[place]
        mask = torch.ones(1, channels, 1, 1, dtype=x.dtype, requires_grad=True)
        handle = getattr(model, place).register_forward_hook(
            lambda m, a, out, mask=mask: out * mask
        )
        try:
            z = z_of(model(x[i : i + 1]), i)
        finally:
            handle.remove()
        rows.append(torch.autograd.grad(z, mask)[0].reshape(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("gradients", ["labels", "smoothed", "sampled", "logits"])
def test_u_is_the_derivative_of_a_channel_mask(model: Net, gradients: str) -> None:
    x, y = images(9).tensors
    options = CollectOptions(
        units=("stem", "bn1"), couplings={"sum": [("se2", None), ("stem", None)]}
    )
    got = collect_statistics(model, loader(9, 4), gradients=gradients, options=options)
    model.eval()
    keys = image_keys(x)

    def z(logits: Tensor, i: int) -> Tensor:
        if gradients == "logits":
            return (logits * normal(keys[i : i + 1], CLASSES)).sum()
        label = y[i : i + 1]
        if gradients == "sampled":
            below = logits.detach().softmax(1).cumsum(1)
            label = (below < uniform(keys[i : i + 1], 1)).sum(1)
        smooth = 0.1 if gradients == "smoothed" else 0.0
        return nn.functional.cross_entropy(logits, label, label_smoothing=smooth)

    u = {place: masked_u(model, x, z, place) for place in ("se1", "se2", "stem", "bn1")}
    places = {"se1": got.values, "se2": got.values, "stem": got.units, "bn1": got.units}
    u["sum"] = u["se2"] + u["stem"]
    for name, kind in (places | {"sum": got.groups}).items():
        own = kind[name]
        torch.testing.assert_close(own["effect_mean"], u[name].mean(0), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(
            own["effect_square"], u[name].square().mean(0), rtol=1e-9, atol=1e-18
        )
        torch.testing.assert_close(
            own["effect_absolute"], u[name].abs().mean(0), rtol=1e-9, atol=1e-14
        )


def test_coupling_indices_map_channels_to_units(model: Net) -> None:
    index = torch.tensor([0, 0, 1, 1, 2, 2, -1, -1])
    options = CollectOptions(couplings={"pairs": [("se2", index)], "all": [("se2", None)]})
    got = collect_statistics(model, loader(), gradients="logits", options=options)
    single = got.groups["all"]["effect_mean"]
    torch.testing.assert_close(got.groups["pairs"]["effect_mean"], single[:6].reshape(3, 2).sum(1))
    torch.testing.assert_close(
        got.groups["all"]["effect_square"], got.values["se2"]["effect_square"]
    )


def test_draws_depend_on_the_image_alone() -> None:
    x = torch.randn(500, 3, 8, 8)
    keys = image_keys(x)
    assert len(keys.unique()) == 500
    assert torch.equal(image_keys(x.flip(0)).flip(0), keys)
    assert not torch.equal(image_keys(x, seed=1), keys)
    v, u = normal(keys, 200), uniform(keys, 200)
    assert abs(float(v.mean())) < 0.01
    assert abs(float(v.var()) - 1) < 0.02
    assert abs(float((v**4).mean()) - 3) < 0.15
    assert abs(float(torch.corrcoef(v.T)[0, 1:].mean())) < 0.02
    assert abs(float(u.mean()) - 0.5) < 0.005


# -- left as found ------------------------------------------------------------------------------


class Explodes:
    """Batches, and then none."""

    def __init__(self, batches: list) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator:
        yield from self.batches
        raise OSError("the disk is gone")


def fingerprint_all(model: nn.Module) -> tuple:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    values = [v.clone() for v in model.state_dict().values()]
    strides = [v.stride() for v in model.state_dict().values()]
    return [m.training for m in model.modules()], hooks, wants, grads, strides, values


@pytest.mark.parametrize("gradients", ["none", "logits"])
@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_as_found(model: Net, gradients: str, breaks: bool) -> None:
    model.train()
    model.se1.eval()
    model.stem.weight.requires_grad_(False)
    before = fingerprint_all(model)
    if breaks:
        with pytest.raises(OSError, match="the disk is gone"):
            collect_statistics(model, Explodes(list(loader())), gradients=gradients)
    else:
        options = CollectOptions(channels_last=True)
        collect_statistics(model, loader(), gradients=gradients, options=options)
    after = fingerprint_all(model)
    assert before[:-1] == after[:-1]
    assert all(torch.equal(a, b) for a, b in zip(before[-1], after[-1]))


def test_autocast_changes_no_more_than_rounding() -> None:
    torch.manual_seed(0)
    net = Net()
    data = TensorDataset(*(t.float() if t.is_floating_point() else t for t in images().tensors))
    exact, rounded = (
        collect_statistics(
            net,
            DataLoader(data, batch_size=8),
            gradients="logits",
            options=CollectOptions(precision=precision),
        )
        for precision in ("no", "bf16")
    )
    for key, tolerance in (("mean", 0.02), ("energy_before", 0.05), ("effect_square", 0.2)):
        a, b = exact.values["se1"][key], rounded.values["se1"][key]
        assert float((a - b).abs().max() / a.abs().max()) < tolerance, key


# -- files --------------------------------------------------------------------------------------


def test_save_and_load(model: Net, tmp_path: Path) -> None:
    options = CollectOptions(
        units=("stem",), couplings={"a/b": [("se2", None)]}, meta={"data": "d1"}
    )
    want = collect_statistics(model, loader(), gradients="logits", options=options)
    want.save(tmp_path / "statistics.safetensors")
    got = GateStatistics.load(tmp_path / "statistics.safetensors")
    same(got, want, tolerance=0)
    for key in ("gates", "samples", "classes", "gradients", "warnings", "meta"):
        assert getattr(got, key) == getattr(want, key), key
    assert got.meta.keys() == {"model", "data"}


def test_statistics_of_something_else_are_refused(model: Net) -> None:
    got = collect_statistics(model, loader(), options=CollectOptions(meta={"data": "d1"}))
    got.require(data="d1", model=got.meta["model"])
    with pytest.raises(InputError) as caught:
        got.require(model="abc", data="d1", preprocessing="224")
    assert caught.value.what == "the statistics belong to another model and another preprocessing"
    assert "preprocessing is not noted, wanted '224'" in caught.value.why
    assert "seprune collect" in caught.value.fix


def test_a_damaged_file_is_refused_wherever_it_is_damaged(model: Net, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    collect_statistics(model, loader()).save(path)
    whole = path.read_bytes()
    spots = np.linspace(0, len(whole) - 1, 60).astype(int)
    damaged = [whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :] for i in spots]
    damaged += [whole[: len(whole) // 2], whole + b"x", b"", b"\0" * 100, b"<html>"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"s\.safetensors") as caught:
            GateStatistics.load(path)
        assert caught.value.why
        assert caught.value.fix
    with pytest.raises(InputError, match="no such file"):
        GateStatistics.load(tmp_path / "none")


def test_gates_of_every_image(model: Net, tmp_path: Path) -> None:
    path = tmp_path / "gates.npy"
    collect_statistics(model, loader(), options=CollectOptions(per_sample=path))
    rows = np.load(path, mmap_mode="r")
    assert rows.shape == (41, 20)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[:, :12], by_hand(model, images().tensors[0])[0], rtol=1e-6)


class Interrupted:
    def __init__(self, data: DataLoader, after: int) -> None:
        self.data, self.after, self.batch_size = data, after, 4

    def __iter__(self) -> Iterator:
        for i, batch in enumerate(self.data):
            if i == self.after:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_collection_goes_on(model: Net, tmp_path: Path) -> None:
    options = CollectOptions(folder=tmp_path, every=2, units=("stem",), meta={"data": "d"})
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(
            model, Interrupted(loader(41, 4), 5), gradients="logits", options=options
        )
    (left,) = tmp_path.iterdir()
    assert left.name == "collecting-0of1.safetensors"
    (tmp_path / ".abc.seprune.part").mkdir()  # of a writer that was killed
    forwards = []
    handle = model.register_forward_hook(lambda m, args, out: forwards.append(len(args[0])))
    got = collect_statistics(model, loader(41, 7), gradients="logits", options=options)
    handle.remove()
    assert sum(n for n in forwards if n > 2) == 41 - 16  # 4 batches of 4 were committed
    same(got, collect_statistics(model, loader(), gradients="logits", options=options))
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_collection_of_something_else_is_refused(model: Net, tmp_path: Path) -> None:
    options = CollectOptions(folder=tmp_path, every=1, meta={"data": "old", "preprocessing": "p"})
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(model, Interrupted(loader(), 2), options=options)
    other = CollectOptions(folder=tmp_path, every=1, meta={"data": "new", "preprocessing": "p"})
    with pytest.raises(InputError, match="belong to another data\n") as caught:
        collect_statistics(model, loader(), options=other)
    assert caught.value.why == (
        "data is 'old', wanted 'new' (other files, or files of other sizes)"
    )
    assert "delete" in caught.value.fix


# -- faults -------------------------------------------------------------------------------------


def test_no_gates() -> None:
    with pytest.raises(InputError, match="no gates") as caught:
        collect_statistics(Gateless().double(), loader())
    assert "seprune inspect" in caught.value.fix
    units = CollectOptions(units=("conv",))
    got = collect_statistics(Gateless().double(), loader(), gradients="logits", options=units)
    assert got.units["conv"]["effect_square"].shape == (6,)
    assert got.values == {}


def test_nan_names_the_gate_and_the_batch(model: Net) -> None:
    x, y = images().tensors
    x = x.clone()
    x[19, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="gate 'se1': NaN or infinity in batch 2"):
        collect_statistics(model, DataLoader(TensorDataset(x, y), batch_size=8))


def test_an_empty_loader(model: Net) -> None:
    for empty in ([], DataLoader(images(3), batch_size=8, drop_last=True)):
        with pytest.raises(InputError, match="no images") as caught:
            collect_statistics(model, empty)
        assert "drop_last" in caught.value.fix


def test_a_model_that_takes_more_than_an_image() -> None:
    class Two(Net):
        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return super().forward(image * mask)

    with pytest.raises(InputError, match=r"Two\.forward takes more than an image: image, mask"):
        collect_statistics(Two(), loader())


def test_labels_that_are_no_class(model: Net) -> None:
    x, strange = images().tensors
    strange[3], strange[20] = 5, -1
    data = DataLoader(TensorDataset(x, strange), batch_size=8)
    for gradients in ("none", "labels"):
        with pytest.raises(InputError, match=r"2 labels are outside 0\.\.4"):
            collect_statistics(model, data, gradients=gradients)


def test_images_without_labels(model: Net) -> None:
    class Bare(Dataset):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, i: int) -> Tensor:
            return images(10).tensors[0][i]

    bare = DataLoader(Bare(), batch_size=4)
    got = collect_statistics(model, bare, gradients="logits")
    assert got.samples == 10
    assert "class_mean" not in got.values["se1"]
    assert any("without class numbers" in w for w in got.warnings)
    with pytest.raises(InputError, match="gradients 'labels' need labels"):
        collect_statistics(model, bare, gradients="labels")


def test_units_that_cannot_be(model: Net) -> None:
    model.spare = nn.Conv2d(3, 3, 1).double()
    for unit, message in (("nothing", "no such module"), ("spare", "never calls this module")):
        options = CollectOptions(units=(unit,))
        with pytest.raises(InputError, match=message):
            collect_statistics(model, loader(), gradients="logits", options=options)
    with pytest.raises(InputError, match="units and couplings need derivatives"):
        collect_statistics(model, loader(), options=CollectOptions(units=("stem",)))
    wrong = CollectOptions(couplings={"g": [("se1", torch.arange(3))]})
    with pytest.raises(InputError, match="coupling 'g': member 'se1' does not fit") as caught:
        collect_statistics(model, loader(), gradients="logits", options=wrong)
    assert "12 channels" in caught.value.why
    assert "the index 3" in caught.value.why


def test_caveats_are_listed(model: Net) -> None:
    x, _ = images(3).tensors
    one = DataLoader(TensorDataset(x, torch.full((3,), 2)), batch_size=8)
    nn.init.zeros_(model.se1.fc2.weight)
    nn.init.ones_(model.se2.fc1.bias)
    nn.init.constant_(model.se2.fc2.bias, 2)
    warnings = " | ".join(collect_statistics(model, one).warnings)
    assert "1 of 2 gates are the same for every image: 'se1'" in warnings
    assert "1 of 2 gates are saturated" in warnings
    assert "3 images, less than one batch of 8" in warnings
    assert "all images are of class 2" in warnings


def test_a_gate_module_that_never_runs_is_listed(model: Net) -> None:
    model.spare = SE(8).double()
    got = collect_statistics(model, loader())
    assert [(g.name, g.runs) for g in got.gates] == [("se1", True), ("se2", True), ("spare", False)]
    assert got.values.keys() == {"se1", "se2"}
    assert "gate 'spare' never runs: it has no statistics" in got.warnings


class Narrow(Net):
    """Fits no more than `kind` images."""

    kind = 3

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.kind:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(x)


def test_out_of_memory_halves_the_batch() -> None:
    torch.manual_seed(0)
    narrow = Narrow().double()
    got = collect_statistics(narrow, loader(), gradients="labels")
    torch.manual_seed(0)
    same(got, collect_statistics(Net().double(), loader(), gradients="labels"))
    assert got.warnings[-1].startswith("batches of more than 2 images did not fit into memory")
    structure = find_structure(narrow, images(2).tensors[0])
    Narrow.kind = 2
    try:
        collect_statistics(narrow, loader(), structure=structure, gradients="none")
        handle = narrow.register_forward_pre_hook(_too_much)
        with pytest.raises(EnvironmentFault, match="out of memory with a single image"):
            collect_statistics(narrow, loader(), structure=structure, gradients="none")
        handle.remove()
    finally:
        Narrow.kind = 3


_calls = []


def _too_much(module: nn.Module, args: tuple) -> None:
    _calls.append(1)
    if len(_calls) > 3:  # the looks at the first images may pass
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_progress_counts_images(model: Net) -> None:
    seen = {}

    def track(iterable, *, label: str, total: int, unit: str = "images") -> Iterator:
        seen.update(label=label, total=total, unit=unit, count=0)
        for item in iterable:
            seen["count"] += 1
            yield item

    collect_statistics(model, loader(), track=track)
    assert seen == {"label": "collecting", "total": 41, "unit": "images", "count": 41}


def test_facts_in_a_file_are_plain_json(model: Net, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    collect_statistics(model, loader()).save(path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    facts = json.loads(header["__metadata__"]["facts"])
    assert facts["gates"][0]["name"] == "se1"
    assert facts["samples"] == 41


def test_moments_of_weights_survive_other_batches_a_file_and_an_interruption(tmp_path):
    model = dependent("residual")
    x, y = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    at_once = collect_statistics(
        model, [(x, y)], gradients="weights", options=CollectOptions(device="cpu")
    )
    assert not at_once.groups
    assert at_once.weights["blocks.0.conv1.weight"]["taylor"].shape == (8, 8)
    assert not any(p.grad is not None for p in model.parameters())

    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield x[:2], y[:2]
        raise KeyboardInterrupt

    options = CollectOptions(device="cpu", folder=tmp_path, every=1)
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(model, broken(), gradients="weights", options=options)
    parts = [(x[:2], y[:2]), (x[2:5], y[2:5]), (x[5:], y[5:])]
    collect_statistics(model, parts, gradients="weights", options=options).save(tmp_path / "s")
    again = GateStatistics.load(tmp_path / "s")
    for name, own in at_once.weights.items():
        for key, value in own.items():
            torch.testing.assert_close(again.weights[name][key], value, rtol=1e-6, atol=1e-12)
